"""The peer's ServerApp: stock FedAvg over all clients. It writes when each round ended and how long the clients trained."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_vit.task import SMALL, get_model, peft

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; the report is JSON with ``ends``, the first of them before round 1, and ``train`` seconds."""
    clients, ends = context.run_config["clients"], []
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    result = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients).start(
        grid=grid,
        initial_arrays=ArrayRecord(peft().get_peft_model_state_dict(get_model(**SMALL))),
        num_rounds=context.run_config["rounds"],
        evaluate_fn=lambda round, arrays: ends.append(time.monotonic()),
    )
    train = [clients * metrics["seconds"] for _, metrics in sorted(result.train_metrics_clientapp.items())]
    Path(context.run_config["report"]).write_text(json.dumps({"ends": ends, "train": train}))
