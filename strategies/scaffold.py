"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378): each client corrects its steps by how its gradient differs from all clients'.

    client k:   g <- g + c - c_k in every step        c_k+ = mean of g over its steps, without the correction
    server:     w <- w + rate * sum_k p_k (w_k - w)        c <- c + (1 / N) sum_k (c_k+ - c_k) = mean of c_k over all N clients

c travels down and the client's share of its change, (c_k+ - c_k) / N, up, beside the weights as ``control.<name>``: twice the
bytes. N is a client's to know, so the server only sums. c_k lives in the client's state folder and starts at zero. Under
plain SGD at a constant rate c_k+ is the paper's option II, c_k - c + (w - w_k) / (steps * rate), and that is where the theory
is: set recipe.optimizer=sgd recipe.momentum=0. With Adam that formula has no meaning; the mean gradient keeps one. Every
client counts once in c, so the optimum that is found is that of the clients' losses, each counted once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import PositiveFloat

from fl.adapter import Adapter, apart, average, flat, move, ride
from fl.recipe import Recipe
from strategies import Strategy


def scaffold(recipe: Recipe, rate: PositiveFloat = 1.0) -> Strategy:
    """`fedavg` with control variates and a server ``rate``; the state is the message, weights and c."""
    asks = replace(recipe, control=True)

    def init(adapter: Adapter) -> Adapter:
        return flat({**adapter, **ride("control", {n: torch.zeros_like(t) for n, t in adapter.items()})})

    def apply(state, round, updates):
        shares: Adapter = {}

        def weights():
            nonlocal shares
            for u in updates:
                came = apart(u.adapter)
                shares = move(came.control, shares)
                yield came.own, u.examples

        step = average(weights())
        return move(state, {n: rate * t for n, t in step.items()} | ride("control", shares))

    return Strategy(
        linear=True,
        init=init,
        ask=lambda state, round, client: (asks, state),
        apply=apply,
        view=lambda state: apart(state).own,
    )
