"""Several clients of one process trained at once, stacked on the frozen base that they share (`fl.lean.stacked`).

Each has its own small tensors, images and stream, and comes out as `clients.local.train` would have brought it out, to rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import lru_cache
from itertools import groupby
from typing import Callable, Iterable, Iterator, Sequence

from torch import nn

from clients import local
from clients.local import Client, Trained
from fl import adapter as adapters
from fl.adapter import Adapter
from fl.config import Config
from fl.flat import Layout
from fl.lean.stacked import check, stack
from fl.learn import fit_together
from fl.models import Forward
from fl.models.lora import take_rank
from fl.recipe import Recipe

Train = Callable[..., Trained]

def companies(clients: Sequence[Client], members: Iterable[int], most: int) -> Iterator[list[int]]:
    """``members`` in their order, cut into those who train at once: at most so many neighbours of one config, rank and number of images."""

    def kind(i: int) -> tuple:
        return clients[i].config, clients[i].rank, clients[i].holdings.train.size

    for _, alike in groupby(members, kind):
        alike = list(alike)
        yield from (alike[at : at + most] for at in range(0, len(alike), most))


def remarks(config: Config, clients: Sequence[Client], members: Sequence[int]) -> list[str]:
    """What a person should know before the ``members`` of round 1 train. Raises WeightsError for a method that cannot be stacked."""
    if config.together == 1:
        return []
    check(clients[0].bench.model)
    if config.recipe.deadline:
        return [f"together={config.together}: clients train one by one all the same, since recipe.deadline is of each one's own time"]
    sizes = Counter(map(len, companies(clients, members, config.together)))
    return ["round 1: clients train " + ", ".join(f"{size} at once ({times} x)" for size, times in sorted(sizes.items(), reverse=True))]


def train(
    clients: Sequence[Client], round: int, orders: Sequence[tuple[Recipe, Adapter]], scored: bool = False, run: str = "", one: Train = local.train
) -> list[Trained]:
    """`local.train` of each client by its order: a recipe, and what it received. All stand on one base (`local.settle`).

    A client alone, recipes that differ, and those with a deadline, which is of each client's own time, are for ``one``.
    """
    recipe = orders[0][0]
    if len(clients) == 1 or recipe.deadline or any(other != recipe for other, _ in orders):
        return [one(client, round, *order, scored, run) for client, order in zip(clients, orders, strict=True)]
    began, bench = time.monotonic(), clients[0].bench
    tasks = [local.begin(client, round, recipe, received, run) for client, (_, received) in zip(clients, orders, strict=True)]
    starts = [adapters.flat(task.start) for task in tasks]
    take_rank(bench.model, starts[0])
    model, forward = _stacked(bench.model, bench.computed, len(clients), starts[0].layout)
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


@lru_cache(maxsize=2)  # a company, and one that the last are left for
def _stacked(model: nn.Module, computed: Callable[[nn.Module], Forward], clients: int, layout: Layout) -> tuple[nn.Module, Forward]:
    """The stack of so many clients on ``model``, whose trained parameters lie as ``layout`` says, and how it is computed."""
    several = stack(model, clients)
    return several, computed(several)
