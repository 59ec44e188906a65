"""FedAdagrad (Reddi et al., arXiv 2003.00295): `strategies.fedopt` with a second moment that only grows.

    v <- v + D^2        D = sum_k p_k (w_k - w)
"""

from __future__ import annotations

from pydantic import PositiveFloat

from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedopt import Beta, Rates, fedopt


def fedadagrad(
    recipe: Recipe, rate: PositiveFloat = 0.02, rates: Rates = {}, beta1: Beta = 0.0, tau: PositiveFloat = 1e-3
) -> Strategy:
    """Adagrad on the server; ``rates`` by parameter group, ``rate`` for the others."""
    return fedopt(recipe, lambda v, square: v + square, rate, rates, beta1, tau)
