# Two commands: `make demo` (install and the first run) and `make test`. `make clean` forgets the environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test install clean

demo: $(VENV)/sim
	$(BIN)/python -m simulations.demo

test: $(VENV)/test
	$(BIN)/python -m pytest

install: $(VENV)/sim

$(VENV)/sim $(VENV)/test: $(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
