"""Coordinate-wise median (Yin et al., arXiv 1803.01498): each coordinate by itself, the middle of the clients' values.

    w_i <- w_i + median_k (w_k - w)_i        for an even number of clients the mean of the two in the middle

Fewer than half of the clients, whatever they send, cannot carry a coordinate past the honest values. Every client counts
the same, since the number of images is the client's own word. A and B are taken coordinate by coordinate: the rule sees
the factors' frame, not their product. Where clients see different classes, it forgets what few of them know.
"""

from __future__ import annotations

import torch

from fl.adapter import check_like, move
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def median(recipe: Recipe) -> Strategy:
    """The middle of the updates, coordinate by coordinate."""

    def apply(state, round, updates):
        sent = [u.adapter for u in updates]
        if not sent:
            raise ValueError("a median needs at least 1 client, got 0")
        for other in sent[1:]:
            check_like(other, sent[0])
        return move(state, {name: middle(torch.stack([a[name] for a in sent])) for name in sent[0]})

    return fedavg(recipe)._replace(linear=False, apply=apply)


def middle(values: torch.Tensor) -> torch.Tensor:
    """The median along the first dimension."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
