"""The Flower ServerApp: load the config, federate, leave the run's record. It holds no key, no cipher, no images."""

from __future__ import annotations

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.config import load
from fl.journal import Journal, run_name
from strategies.flower import federate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; what goes wrong is one line and a failed run."""
    try:
        config = load(str(context.run_config.get("overrides", "")))
        federate(grid, config, Journal(config, run_name(config)))
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise  # so that the engine's status of the run is "failed"
