"""What is kept of a round and of a run: sums and rows, the same whoever drove it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import torch

from fl.adapter import Adapter, apart, norms
from fl.wire.ledger import ENVELOPE, Entry, summarise
from strategies import Update
from strategies.diagnostics import diagnose


class Evaluation(NamedTuple):
    """One client's evaluation of the global adapter: summed loss, correct answers, examples."""

    client: int
    loss: float
    correct: int
    examples: int


class Watch:
    """What is kept of a round's updates as they pass: of each a row, and of a round of ``few`` all, to compare them."""

    def __init__(self, few: bool) -> None:
        self.few = few
        self.rows: list[dict[str, Any]] = []
        self.kept: list[tuple[Adapter, Update]] = []

    def see(self, given: Adapter, update: Update) -> Update:
        """Keep what is to be kept of the ``update`` of what was ``given``, and hand it on."""
        self.rows.append({"client": update.client, "examples": update.examples, **update.metrics, "norms": norms(update.adapter)})
        if self.few:
            self.kept.append((apart(given).own, update._replace(adapter=apart(update.adapter).own)))
        return update


def history_row(round: int, watch: Watch, evaluations: Sequence[Evaluation], ledger: Sequence[Entry], seconds: float) -> dict[str, Any]:
    """One round as a JSON object.

    Evaluation shards are disjoint, so the sums over clients give the exact accuracy over all their images;
    ``accuracy_p10`` is the tenth percentile of the clients' own accuracies. ``personal`` is the same of each client's own
    model, for those that trained. ``train_seconds`` is the sum of what the clients spent on training; ``seconds`` is the
    round on the wall.
    """
    clients = watch.rows
    row: dict[str, Any] = {
        "round": round,
        "cohort": [c["client"] for c in clients],
        "train_loss": sum(c["loss"] * c["examples"] for c in clients) / sum(c["examples"] for c in clients),
        "seconds": seconds,
        "train_seconds": sum(c["seconds"] for c in clients),
        "bytes": summarise(ledger),
        "clients": clients,
    }
    if watch.kept:
        row["diagnostics"] = diagnose(watch.kept)
    own = [Evaluation(c["client"], *(c[f"own_{n}"] for n in ("loss", "correct", "examples"))) for c in clients if "own_loss" in c]
    if own:
        row["personal"] = spread(own)
    if evaluations:
        row |= spread(evaluations) | {"evaluations": [e._asdict() for e in evaluations]}
    return row


def spread(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Accuracy and loss over all images together, and the tenth percentile of the clients' accuracies."""
    seen = sum(e.examples for e in evaluations)
    each = torch.tensor([e.correct / e.examples for e in evaluations], dtype=torch.float64)
    return {
        "accuracy": sum(e.correct for e in evaluations) / seen,
        "accuracy_p10": float(each.quantile(0.1)),
        "loss": sum(e.loss for e in evaluations) / seen,
    }


def is_training(name: str, sums: Mapping[str, Any]) -> bool:
    """Whether messages of this ``name`` count as training; a blind run's sums may come with a report or an evaluation."""
    return name.startswith("train ") or "report down" in sums and name in ("report down", "report up", "evaluate down")


def totals(rows: Sequence[Mapping[str, Any]], full_bytes: int, before: Iterable[Mapping[str, Mapping[str, int]]] = ()) -> dict[str, Any]:
    """Bytes and seconds of a run, and its bytes per client and round against full-model FedAvg's.

    ``full_bytes`` is the packed size of a float32 message with every parameter; in the envelope of an upload, that is what
    one message of the method `full` measures. ``before`` is what came before the rounds, each time that the run was begun. Of
    answers that were refused it gives the number by code.
    """
    sums: dict[str, Counter[str]] = {}
    for part in (*before, *(row["bytes"] for row in rows)):
        for name, sizes in part.items():
            sums.setdefault(name, Counter()).update(sizes)
    up, times = sums["train up"], sum(len(row["cohort"]) for row in rows)
    learning = {way: sum(sums[name]["total"] for name in sums if name.endswith(way) and is_training(name, sums)) for way in ("down", "up")}
    per_round = {way: size / times for way, size in learning.items()}
    full = full_bytes + up[ENVELOPE] / up["messages"]
    return {
        "bytes": {name: dict(counter) for name, counter in sums.items()},
        "bytes_per_client_round": per_round,
        "full_model_message_bytes": round(full),
        "ratio_to_full_fedavg": sum(per_round.values()) / (2 * full),
        "train_seconds": sum(row.get("train_seconds", 0) for row in rows),  # a blind server is not told
        "refused": dict(Counter(one["code"] for row in rows for one in row.get("refused", ()))),
    }
