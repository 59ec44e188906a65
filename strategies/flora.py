"""FLoRA (Wang et al., arXiv 2409.05976): the clients' products go into the frozen base, and fresh factors start every round.

    W <- W + s sum_k p_k B_k A_k = W + s [B_1 ... B_K] [p_1 A_1; ...; p_K A_K]        A <- a fresh draw,  B <- 0

Exact: the base takes the mean of products, whatever its rank and those of the clients, each of whom starts from the first
r_k rows of A. The price is the way down: K r columns go to every client, trained in the round or not. The scale s is the same for all and is applied by the client, as it is to B A. What is no
factor is averaged. A's draws are a function of ``seed``, round and name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fl.adapter import Adapter, group, mean, move
from fl.randomness import generator
from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.grown import Grown, grown, lacking


class Flora(NamedTuple):
    """The adapter that a round starts from, and how the base has changed until then."""

    adapter: Adapter
    base: Grown = Grown()


def flora(recipe: Recipe, seed: int = 0) -> Strategy:
    """Stack the clients' factors onto the base and begin anew."""

    def draw(name: str, round: int, like: Tensor) -> Tensor:
        bound = like.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5), as the first A
        return torch.empty_like(like).uniform_(-bound, bound, generator=generator(seed, "flora", round, name))

    def apply(state: Flora, round, updates):
        updates = list(updates)
        weights = [u.examples for u in updates]
        rest = [{n: t for n, t in u.adapter.items() if group(n) not in factors.AXIS} for u in updates]
        after = dict(move(state.adapter, mean(rest, weights)))
        trained = [move(factors.at_rank(state.adapter, factors.rank_of(u.adapter)), u.adapter) for u in updates]
        step = {}
        for a, b in factors.pairs(state.adapter):
            left, right = factors.stack(trained, weights, a, b)
            step[a], step[b] = right.to(after[a].dtype), left.to(after[b].dtype)
            after[a], after[b] = draw(a, round, after[a]), torch.zeros_like(after[b])
        return Flora(after, grown(state.base, round, step))

    return Strategy(
        linear=False,
        init=factors.together_only(recipe, lambda adapter: Flora(factors.required(adapter))),
        ask=lambda state, round, client: (recipe, factors.at_rank(state.adapter, client.rank)),
        apply=apply,
        view=lambda state: state.adapter,
        base=lambda state, since: lacking(state.base, since),
        ranks=True,
    )
