"""The Flower ServerApp: load the config, federate, leave the run's record. It holds no key, no cipher, no images."""

from __future__ import annotations

import os
import sys
from typing import Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.config import Config, ConfigError, load, node
from fl.durable import IntegrityError
from fl.journal import Journal, run_name
from strategies.flower import federate
from strategies.talk import QuorumLost

app = ServerApp()
STATUS = {ConfigError: 2, QuorumLost: 5, IntegrityError: 6}  # the exit status that a launcher gives; of all else it is 4


def placed(config: Config, environ: Mapping[str, str]) -> Config:
    """The config with the coordinator's own output folder, which no run's words hold: VEILORA_OUTPUT. Raises ConfigError."""
    output = environ.get("VEILORA_OUTPUT")
    return config.at_node(node({"output": output})) if output else config


def status_of(error: Exception) -> int | None:
    """The exit status that `STATUS` gives an error of this kind; None of all else."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), None)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; what goes wrong is one line and a failed run."""
    try:
        overrides = str(context.run_config.get("overrides", ""))
        config = load(overrides)
        simulated = bool({"flwr.simulation.app", "simulations.inprocess"} & set(sys.modules))
        driver = "flower" if simulated else "deployment"
        config = config if simulated else placed(config, os.environ)
        journal = Journal(config, run_name(config), driver=driver, overrides=overrides)
        if journal.finished:
            journal.say(f"{journal.run} is finished; there is nothing to resume")
            return
        federate(grid, config, journal)
    except Exception as error:
        status = status_of(error)
        print("error: " + " ".join(str(error).split()) + (f" (exit status {status})" if status else ""), file=sys.stderr, flush=True)
        raise  # so that the engine's status of the run is "failed"
