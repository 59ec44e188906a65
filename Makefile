# Two commands: `make demo` (install and the first run) and `make test`. `make clean` forgets the environment.
# With CONSTRAINTS=.ci/oldest.txt, or .ci/newest.txt, in an environment of exactly those releases: .venv-oldest.
PYTHON ?= python3
CONSTRAINTS ?=
VENV ?= .venv$(addprefix -,$(basename $(notdir $(CONSTRAINTS))))
BIN = $(VENV)/bin

.PHONY: demo test install clean

demo: $(VENV)/sim
	$(BIN)/python -m simulations.demo

test: $(VENV)/test
	$(BIN)/python -m pytest

install: $(VENV)/sim

$(VENV)/sim $(VENV)/test: $(VENV)/%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS)) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
