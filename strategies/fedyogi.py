"""FedYogi (Reddi et al., arXiv 2003.00295): `strategies.fedopt` with Yogi's second moment, which forgets slowly.

    v <- v - (1 - beta2) D^2 sign(v - D^2)        D = sum_k p_k (w_k - w)
"""

from __future__ import annotations

from pydantic import PositiveFloat

from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedopt import Beta, Rates, fedopt


def fedyogi(
    recipe: Recipe, rate: PositiveFloat = 0.01, rates: Rates = {}, beta1: Beta = 0.9, beta2: Beta = 0.99, tau: PositiveFloat = 1e-3
) -> Strategy:
    """Yogi on the server; ``rates`` by parameter group, ``rate`` for the others."""
    return fedopt(recipe, lambda v, square: v - (1 - beta2) * square * (v - square).sign(), rate, rates, beta1, tau)
