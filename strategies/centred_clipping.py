"""Centred clipping (Karimireddy et al., arXiv 2012.10333): the mean around a centre that no client can pull far.

    v <- v + mean_k (u_k - v) min(1, radius / |u_k - v|)        some times, from the last round's v        w <- w + v

The paper sets the radius by hand; ``radius=median`` is the median distance to v at each step, which needs no scale: it
shrinks as v nears the majority. All tensors of an update together are one point. Every client counts the same, since the
number of images is the client's own word. Without the paper's client momentum, a slow drift over rounds can still add up.
"""

from __future__ import annotations

from statistics import median
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from fl.adapter import mean, move, norm, sub
from fl.recipe import Recipe
from strategies import Strategy


def centred_clipping(recipe: Recipe, radius: PositiveFloat | Literal["median"] = "median", steps: PositiveInt = 5) -> Strategy:
    """The mean of the updates, each clipped to ``radius`` around the centre, which moves in so many ``steps``."""

    def apply(state, round, updates):
        weights, centre = state
        sent = [u.adapter for u in updates]
        if not sent:
            raise ValueError("centred_clipping needs at least 1 client, got 0")
        centre = {name: centre[name] for name in sent[0]}
        for _ in range(steps):
            ways = [sub(a, centre) for a in sent]
            lengths = [norm(way) for way in ways]
            bound = median(lengths) if radius == "median" else radius
            shares = [bound / length if length > bound else 1.0 for length in lengths]
            pulls = [{n: share * t for n, t in way.items()} for way, share in zip(ways, shares)]
            centre = move(centre, mean(pulls, [1] * len(pulls)))
        return move(weights, centre), state[1] | centre

    return Strategy(
        linear=False,
        init=lambda adapter: (adapter, {name: 0 * t for name, t in adapter.items()}),
        ask=lambda state, round, client: (recipe, state[0]),
        apply=apply,
        view=lambda state: state[0],
    )
