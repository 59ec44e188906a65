"""What is kept of a round and of a run: sums and rows, the same whoever drove it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping, NamedTuple, Sequence

from fl.adapter import norms
from fl.wire.ledger import Entry, summarise
from strategies import Update


class Evaluation(NamedTuple):
    """One client's evaluation of the global adapter: summed loss, correct answers, examples."""

    client: int
    loss: float
    correct: int
    examples: int


def history_row(
    round: int, updates: Sequence[Update], evaluations: Sequence[Evaluation], ledger: Sequence[Entry], seconds: float
) -> dict[str, Any]:
    """One round as a JSON object.

    Evaluation shards are disjoint, so the sums over clients give the exact accuracy over all their images.
    ``train_seconds`` is the sum of what the clients spent on training; ``seconds`` is the round on the wall.
    """
    weight = sum(u.examples for u in updates)
    row: dict[str, Any] = {
        "round": round,
        "cohort": [u.client for u in updates],
        "train_loss": sum(u.metrics["loss"] * u.examples for u in updates) / weight,
        "seconds": seconds,
        "train_seconds": sum(u.metrics["seconds"] for u in updates),
        "bytes": summarise(ledger),
        "clients": [{"client": u.client, "examples": u.examples, **u.metrics, "norms": norms(u.adapter)} for u in updates],
    }
    if evaluations:
        seen = sum(e.examples for e in evaluations)
        row |= {
            "accuracy": sum(e.correct for e in evaluations) / seen,
            "loss": sum(e.loss for e in evaluations) / seen,
            "evaluations": [e._asdict() for e in evaluations],
        }
    return row


def totals(
    rows: Sequence[Mapping[str, Any]], full_bytes: int, envelope: int = 0, before: Sequence[Entry] = ()
) -> dict[str, Any]:
    """Bytes and seconds of a run, and its bytes per client and round against full-model FedAvg's.

    ``full_bytes`` is the packed size of a float32 message with every parameter, ``envelope`` what the transport adds to a
    message: together, what one message of the method `full` measures. ``before`` is what came before round 1.
    """
    sums = {name: Counter(sizes) for name, sizes in summarise(before).items()}
    for row in rows:
        for name, sizes in row["bytes"].items():
            sums.setdefault(name, Counter()).update(sizes)
    train = [sums[name] for name in ("train down", "train up")]
    per_message = [s["total"] / s["messages"] for s in train]
    full = full_bytes + envelope
    return {
        "bytes": {name: dict(counter) for name, counter in sums.items()},
        "bytes_per_client_round": {"down": per_message[0], "up": per_message[1]},
        "full_model_message_bytes": full,
        "ratio_to_full_fedavg": sum(per_message) / (2 * full),
        "train_seconds": sum(row["train_seconds"] for row in rows),
    }
