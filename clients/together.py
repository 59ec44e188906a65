"""Several clients of one process trained at once, stacked on the frozen base that they share (`fl.lean.stacked`).

Each has its own small tensors, images and stream, and comes out as `clients.local.train` would have brought it out, to rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import groupby
from typing import Callable, Iterable, Iterator, Sequence

from clients import local
from clients.local import Client, Trained
from fl import adapter as adapters
from fl.adapter import Adapter
from fl.config import Config
from fl.lean.stacked import check
from fl.learn import fit_together
from fl.models.lora import take_rank
from fl.recipe import Recipe

Order = tuple[Recipe, Adapter]
"""What a client is to do, and what it received."""

Train = Callable[..., Trained]
"""One client's way to train, as `local.train`."""


def companies(clients: Sequence[Client], members: Iterable[int], most: int) -> Iterator[list[int]]:
    """``members`` in their order, cut into those who train at once: neighbours of one config, rank and number of images."""

    def kind(i: int) -> tuple:
        return clients[i].config, clients[i].rank, clients[i].holdings.train.size

    for _, alike in groupby(members, kind):
        alike = list(alike)
        yield from (alike[at : at + most] for at in range(0, len(alike), most))


def remarks(config: Config, clients: Sequence[Client], members: Sequence[int]) -> list[str]:
    """What a person should know before the ``members`` of round 1 train. Raises WeightsError for a method without stacks."""
    if config.together == 1:
        return []
    check(clients[0].bench.model)
    if config.recipe.deadline:
        return [f"together={config.together}: clients train one by one all the same, for recipe.deadline is of a client's own time"]
    sizes = Counter(map(len, companies(clients, members, config.together)))
    if set(sizes) == {1}:
        return [f"together={config.together}: clients train one by one all the same, for no neighbours have as many images each"]
    parts = (f"{size} at once ({times} x)" for size, times in sorted(sizes.items(), reverse=True))
    return ["round 1: clients train " + ", ".join(parts)]


def train(
    clients: Sequence[Client], round: int, orders: Sequence[Order], scored: bool = False, run: str = "", one: Train = local.train
) -> list[Trained]:
    """`local.train` of each client by its order; all stand on one base to rounding (`local.settle`), the last one's.

    A client alone, recipes that differ, and those with a deadline, which is of a client's own time, are for ``one``.
    """
    recipe = orders[0][0]
    if len(clients) == 1 or recipe.deadline or any(other != recipe for other, _ in orders):
        return [one(client, round, *order, scored, run) for client, order in zip(clients, orders, strict=True)]
    began, bench = time.monotonic(), clients[0].bench
    tasks = [local.begin(client, round, recipe, received, run) for client, (_, received) in zip(clients, orders, strict=True)]
    starts = [adapters.flat(task.start) for task in tasks]
    take_rank(bench.model, starts[0])
    model, forward = bench.stacked(len(clients), starts[0].layout)
    adapters.write_rows(model, starts)
    with adapters.only(model, recipe.groups):
        fitted = fit_together(model, [task.course for task in tasks], recipe, forward)
    ends = zip(clients, tasks, fitted, wholes := adapters.read_rows(model), strict=True)
    answers = [local.end(client, round, recipe, task, own, whole, run) for client, task, own, whole in ends]
    seconds = (time.monotonic() - began) / len(clients)
    for client, whole, (_, _, metrics) in zip(clients, wholes, answers):
        metrics["seconds"] = seconds
        if scored:
            local.put(client, whole)
            metrics |= local.own_score(client)
    return answers
