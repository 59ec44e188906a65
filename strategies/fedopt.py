"""FedOpt (Reddi et al., arXiv 2003.00295, algorithm 2): the mean update is a gradient for an adaptive server.

    D = sum_k p_k (w_k - w)     m <- beta1 m + (1 - beta1) D     v <- second(v, D^2)     w <- w + rate m / (sqrt(v) + tau)

Every coordinate moves by about ``rate`` whatever the clients' step was: so each parameter group has its own, near what one
round changes a coordinate of it. v starts at tau^2, as in the paper; there is no bias correction, as in the paper. The
moments belong to one basis of the factors: no strategy that re-factors A and B can run on top.
`fedadam`, `fedyogi` and `fedadagrad` give ``second``.
"""

from __future__ import annotations

from typing import Annotated, Callable

from pydantic import Field, PositiveFloat
from torch import Tensor

from fl.adapter import Group, average, group, move
from fl.recipe import Recipe
from strategies import Strategy

Beta = Annotated[float, Field(ge=0, lt=1)]
Rates = dict[Group, PositiveFloat]
"""The server's learning rate by parameter group; a group that is not named has the strategy's ``rate``."""


def fedopt(
    recipe: Recipe, second: Callable[[Tensor, Tensor], Tensor], rate: float, rates: Rates, beta1: float, tau: float
) -> Strategy:
    """A server that steps by the first moment over the root of the second, ``second(v, D^2)``."""

    def apply(state, round, updates):
        weights, first, square = state
        step = average((u.adapter, u.examples) for u in updates)
        first = first | {n: beta1 * first[n] + (1 - beta1) * t for n, t in step.items()}
        square = square | {n: second(square[n], t * t) for n, t in step.items()}
        step = {n: rates.get(group(n), rate) * first[n] / (square[n].sqrt() + tau) for n in step}
        return move(weights, step), first, square

    return Strategy(
        linear=True,
        init=lambda adapter: (adapter, {n: 0 * t for n, t in adapter.items()}, {n: 0 * t + tau**2 for n, t in adapter.items()}),
        ask=lambda state, round, client: (recipe, state[0]),
        apply=apply,
        view=lambda state: state[0],
    )
