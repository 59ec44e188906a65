"""FedAdam (Reddi et al., arXiv 2003.00295): `strategies.fedopt` with Adam's second moment.

    v <- beta2 v + (1 - beta2) D^2        D = sum_k p_k (w_k - w)
"""

from __future__ import annotations

from pydantic import PositiveFloat

from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedopt import Beta, Rates, fedopt


def fedadam(
    recipe: Recipe, rate: PositiveFloat = 0.01, rates: Rates = {}, beta1: Beta = 0.9, beta2: Beta = 0.99, tau: PositiveFloat = 1e-3
) -> Strategy:
    """Adam on the server; ``rates`` by parameter group, ``rate`` for the others."""
    return fedopt(recipe, lambda v, square: beta2 * v + (1 - beta2) * square, rate, rates, beta1, tau)
