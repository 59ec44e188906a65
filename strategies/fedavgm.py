"""FedAvgM (Hsu et al., arXiv 1909.06335): FedAvg with momentum on the server.

    v <- beta v + sum_k p_k (w_k - w)        w <- w + rate v

Updates that agree add up to 1 / (1 - beta) times their size: beta = 0.9 wants many rounds or a smaller rate.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from fl.adapter import average, move
from fl.recipe import Recipe
from strategies import Strategy


def fedavgm(recipe: Recipe, beta: Annotated[float, Field(ge=0, lt=1)] = 0.5, rate: PositiveFloat = 1.0) -> Strategy:
    """The example-weighted mean of the updates, its momentum kept by the server."""

    def apply(state, round, updates):
        weights, velocity = state
        step = average((u.adapter, u.examples) for u in updates)
        velocity = velocity | {name: beta * velocity[name] + t for name, t in step.items()}
        return move(weights, {name: rate * velocity[name] for name in step}), velocity

    return Strategy(
        linear=True,
        init=lambda adapter: (adapter, {name: 0 * t for name, t in adapter.items()}),
        ask=lambda state, round, client: (recipe, state[0]),
        apply=apply,
        view=lambda state: state[0],
    )
