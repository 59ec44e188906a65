"""Strategies: what the server asks of the clients and what it makes of their answers, one file each.

A strategy is a record of pure functions. The smallest one, the plain mean, reads

    def fedavg(recipe: Recipe) -> Strategy:
        return Strategy(
            linear=True,
            init=lambda adapter: adapter,
            ask=lambda state, round, client: (recipe, state),
            apply=lambda state, round, updates: move(state, average((u.adapter, u.examples) for u in updates)),
            view=lambda state: state,
        )

and ``conf/strategy/<name>.yaml`` names its builder. Whatever drives it (the plain loop, Flower) is the same for all.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, NamedTuple, Sequence

from fl.adapter import Adapter
from fl.recipe import Recipe

State = Any


class ClientInfo(NamedTuple):
    """What the server knows of a client: its number, how many images it trains on, and how many it is evaluated on.

    ``rank``: of its LoRA factors; None is the run's largest, which the method names.
    """

    client: int
    examples: int
    held: int = 0
    rank: int | None = None


class Update(NamedTuple):
    """One client's answer: the *difference* of its trained adapter from what it received, and how many images made it.

    It holds what the recipe says is `Recipe.sent`: all that trains unless `Strategy.ask` chose otherwise.
    """

    client: int
    adapter: Adapter
    examples: int
    metrics: dict[str, float]


class Strategy(NamedTuple):
    """A federated algorithm as functions and facts.

    ``linear``: the server needs only weighted sums of fixed-shape uploads (so that they may be blinded).
    ``init(adapter)``: the first state, from the adapter that every client starts with.
    ``ask(state, round, client)``: the recipe, and the adapter that this client receives.
    ``apply(state, round, updates)``: the next state; updates come one by one, sorted by client, and must not be changed.
    What is added as it comes takes one buffer, whatever the number of clients; who needs all at once says
    ``list(updates)``.
    ``view(state)``: the global adapter, to evaluate and to keep.
    ``fewest``: clients that a round must have for ``apply`` to make sense.
    ``base(state, since)``: how the frozen weights have changed (`fl.base`) after round ``since``, step by step, and this
    round; it may answer with the whole change as one step, and 0. None leaves them alone.
    ``ranks``: takes clients of different ranks; it is then for ``ask`` to give each factors of its own.
    """

    linear: bool
    init: Callable[[Adapter], State]
    ask: Callable[[State, int, ClientInfo], tuple[Recipe, Adapter]]
    apply: Callable[[State, int, Iterable[Update]], State]
    view: Callable[[State], Adapter]
    fewest: int = 1
    base: Callable[[State, int], tuple[int, Sequence[Adapter]]] | None = None
    ranks: bool = False
