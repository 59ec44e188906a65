"""Flower apps of the bench on an engine of their own."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from simulations.launch import Engine, EngineError

PROJECT = """[project]
name = "{name}"
version = "0.1.0"
description = "A measured app"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "veilora"
[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"
[tool.flwr.app.config]
{settings}
"""


@contextmanager
def bundle(package: str, settings: dict[str, Any]) -> Iterator[Path]:
    """A Flower project made of ``simulations/bench/<package>``, with these settings, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="veilora-app-") as folder:
        source = Path(__file__).parent / package
        shutil.copytree(source, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        text = PROJECT.format(name=package.replace("_", "-"), package=package, settings=lines)
        (Path(folder) / "pyproject.toml").write_text(text)
        yield Path(folder)


def report(own: Engine, package: str, clients: int, workers: int, settings: dict[str, Any]) -> Any:
    """Run the app on the engine ``own`` and return what its server wrote. Raises EngineError when the run failed."""
    with tempfile.TemporaryDirectory(prefix="veilora-report-") as folder:
        written = Path(folder) / "report.json"
        with bundle(package, settings | {"clients": clients, "report": str(written)}) as app:
            if not own.submit(app, clients, workers) or not written.exists():
                raise EngineError(f"the app {package} must complete with {clients} clients, but it failed")
        return json.loads(written.read_text())
