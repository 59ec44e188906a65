"""Norm bounding (Sun et al., arXiv 1911.07963): no update counts for more than its length allows.

    w <- w + mean_k u_k min(1, bound / |u_k|)

The paper sets the bound by hand; ``bound=median`` is the median length of the round's updates, which needs no scale. It
stops a client that shouts, not one that lies in a normal voice: f of n clients can still move the mean by 2 f / n bounds.
All tensors of an update together have one length. Every client counts the same, since the number of images is its own
word. Not linear: who clips must see each update, or believe the client that it did.
"""

from __future__ import annotations

from statistics import median
from typing import Literal

from pydantic import PositiveFloat

from fl.adapter import mean, move, norm
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def norm_bound(recipe: Recipe, bound: PositiveFloat | Literal["median"] = "median") -> Strategy:
    """The mean of the updates, none longer than ``bound``."""

    def apply(state, round, updates):
        sent = [u.adapter for u in updates]
        if not sent:
            raise ValueError("norm_bound needs at least 1 client, got 0")
        lengths = [norm(a) for a in sent]
        most = median(lengths) if bound == "median" else bound
        shares = [most / length if length > most else 1.0 for length in lengths]
        return move(state, mean([{n: share * t for n, t in a.items()} for a, share in zip(sent, shares)], [1] * len(sent)))

    return fedavg(recipe)._replace(linear=False, apply=apply)
