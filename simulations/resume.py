"""Go on with a run that broke off, by what drove it: the plain loop, or Flower's engine.

    python -m simulations.resume RUN_FOLDER            on this machine: the loop, Ray, or Flower in one process
    python -m simulations.resume RUN_FOLDER --show     the command for a deployment, whose SuperLink has the nodes
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from fl.config import ConfigError


def words(folder: Path) -> tuple[str, int, list[str]]:
    """What drove the run in ``folder``, its number of clients, and the overrides that go on with it. Raises ConfigError."""
    try:
        command = json.loads((folder / "command.json").read_text())
        driver, clients, overrides = str(command["driver"]), int(command["clients"]), shlex.split(command["overrides"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"a run's folder must hold command.json, but {folder} does not ({type(error).__name__}); name one that has begun") from None
    kept = [word for word in overrides if not word.startswith(("resume=", "output="))]
    output = [] if driver == "deployment" else [f"output={folder.resolve().parent}"]  # a coordinator's is its own setting
    return driver, clients, [*kept, *output, f"resume={folder.resolve().name}"]


def shown(folder: Path) -> str:
    """`flwr run` as an operator types it to go on with the run."""
    return f"flwr run . SUPERLINK --run-config {shlex.quote('overrides=' + json.dumps(shlex.join(words(folder)[2])))}"


def resume(folder: Path) -> int:
    """Go on with the run in ``folder`` on this machine. Returns the exit status of what drives it. Raises ConfigError."""
    driver, clients, overrides = words(folder)
    if driver == "deployment":
        raise ConfigError(f"a deployment's run is resumed over its SuperLink, with: {shown(folder)}")
    if driver == "loop":
        from simulations import loop

        return loop.main(overrides)
    from simulations import launch

    return launch.main(["--clients", str(clients), *overrides])


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    show, folders = "--show" in arguments, [word for word in arguments if word != "--show"]
    if len(folders) != 1 or folders[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        if not show:
            return resume(Path(folders[0]))
        print(shown(Path(folders[0])))
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
