"""Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498): the mean without the extremes, each coordinate by itself.

    w_i <- w_i + mean of (w_k - w)_i without its c largest and c smallest values        c = ceil(share n), n clients

Up to c attackers cannot carry a coordinate past the honest values. Rounded up, so that a share above zero trims in small
rounds, too, but never so far that nothing is left: three clients are enough. Every client counts the same, since the number of images is the client's own word; like the median it sees the
frame of A and B, not their product.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field

from fl.adapter import check_like, move
from fl.config import ConfigError
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg

FEWEST = 3  # clients: one goes at either end


def trimmed_mean(recipe: Recipe, share: Annotated[float, Field(gt=0, le=0.45)] = 0.2) -> Strategy:
    """The mean of the updates without the ``share`` of the clients at either end, coordinate by coordinate."""

    def apply(state, round, updates):
        sent = [u.adapter for u in updates]
        if len(sent) < FEWEST:
            raise ConfigError(f"trimmed_mean needs {FEWEST} clients in a round, got {len(sent)}; raise clients or fraction")
        cut = trimmed(len(sent), share)
        for other in sent[1:]:
            check_like(other, sent[0])
        kept = {name: torch.stack([a[name] for a in sent]).sort(dim=0).values[cut : len(sent) - cut] for name in sent[0]}
        return move(state, {name: values.mean(dim=0) for name, values in kept.items()})

    return fedavg(recipe)._replace(linear=False, apply=apply, fewest=FEWEST)


def trimmed(clients: int, share: float) -> int:
    """How many values go at either end, at least one of ``FEWEST`` or more being left."""
    return max(1, min(math.ceil(share * clients - 1e-9), (clients - 1) // 2))
