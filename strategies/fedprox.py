"""FedProx (Li et al., arXiv 1812.06127): FedAvg over clients that are held near what they received.

    client: loss + mu / 2 |w - w_received|^2        server: w <- w + sum_k p_k (w_k - w)

The clients' one training loop adds the gradient (`fl.recipe.Recipe.mu`). The pull is on the factors A and B, not on their
product. Not FedProx's inexact solvers: every client takes all its steps.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import PositiveFloat

from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def fedprox(recipe: Recipe, mu: PositiveFloat = 0.01) -> Strategy:
    """`fedavg` under ``recipe`` with the proximal weight ``mu``."""
    return fedavg(replace(recipe, mu=mu))
