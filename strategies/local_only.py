"""Every client alone: nothing is shared, so what any federation gains is measured from here.

Each client trains on from where its own last round ended, under the recipe and the schedule that all strategies have, and
sends an empty update. The global model stays as it started; the clients' own models are what is compared (``personal`` in
each row of the history).
"""

from __future__ import annotations

from dataclasses import replace

from fl.adapter import GROUPS
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def local_only(recipe: Recipe) -> Strategy:
    """`fedavg` of nothing at all."""
    asks = replace(recipe, keep=GROUPS)
    return fedavg(recipe)._replace(ask=lambda state, round, client: (asks, asks.sent(state)))
