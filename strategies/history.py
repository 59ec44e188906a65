"""What is kept of a round and of a run: sums and rows, the same whoever drove it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping, NamedTuple, Sequence

from fl.adapter import norms
from fl.wire.ledger import ENVELOPE, Entry, summarise
from strategies import Update


class Evaluation(NamedTuple):
    """One client's evaluation of the global adapter: summed loss, correct answers, examples."""

    client: int
    loss: float
    correct: int
    examples: int


def client_row(update: Update) -> dict[str, Any]:
    """What is kept of one update when it has been added: everything but its tensors."""
    return {"client": update.client, "examples": update.examples, **update.metrics, "norms": norms(update.adapter)}


def history_row(
    round: int, clients: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation], ledger: Sequence[Entry], seconds: float
) -> dict[str, Any]:
    """One round as a JSON object, from a `client_row` for each update.

    Evaluation shards are disjoint, so the sums over clients give the exact accuracy over all their images.
    ``train_seconds`` is the sum of what the clients spent on training; ``seconds`` is the round on the wall.
    """
    row: dict[str, Any] = {
        "round": round,
        "cohort": [c["client"] for c in clients],
        "train_loss": sum(c["loss"] * c["examples"] for c in clients) / sum(c["examples"] for c in clients),
        "seconds": seconds,
        "train_seconds": sum(c["seconds"] for c in clients),
        "bytes": summarise(ledger),
        "clients": list(clients),
    }
    if evaluations:
        seen = sum(e.examples for e in evaluations)
        row |= {
            "accuracy": sum(e.correct for e in evaluations) / seen,
            "loss": sum(e.loss for e in evaluations) / seen,
            "evaluations": [e._asdict() for e in evaluations],
        }
    return row


def totals(rows: Sequence[Mapping[str, Any]], full_bytes: int, before: Sequence[Entry] = ()) -> dict[str, Any]:
    """Bytes and seconds of a run, and its bytes per client and round against full-model FedAvg's.

    ``full_bytes`` is the packed size of a float32 message with every parameter; in the envelope of an upload, that is what
    one message of the method `full` measures. ``before`` is what came before round 1.
    """
    sums = {name: Counter(sizes) for name, sizes in summarise(before).items()}
    for row in rows:
        for name, sizes in row["bytes"].items():
            sums.setdefault(name, Counter()).update(sizes)
    down, up = sums["train down"], sums["train up"]
    per_message = {"down": down["total"] / down["messages"], "up": up["total"] / up["messages"]}
    full = full_bytes + up[ENVELOPE] / up["messages"]
    return {
        "bytes": {name: dict(counter) for name, counter in sums.items()},
        "bytes_per_client_round": per_message,
        "full_model_message_bytes": round(full),
        "ratio_to_full_fedavg": sum(per_message.values()) / (2 * full),
        "train_seconds": sum(row["train_seconds"] for row in rows),
    }
