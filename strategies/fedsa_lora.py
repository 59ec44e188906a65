"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared, each client keeps a B of its own; half of LoRA's bytes, both ways.

    client k:   W + s B_k A,  trains A and B_k        server:   A <- sum_k p_k A_k

A learns what is common and B what is a client's own. With ``local_head`` the head stays at home, too, as in the paper. What
stays at home lives in the client's state folder. The server's B and head are those of the start, so the accuracy of the
global model is no measure of this strategy: that of the clients' own models is (``personal`` in each row of the history).
"""

from __future__ import annotations

from dataclasses import replace

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def fedsa_lora(recipe: Recipe, local_head: bool = True) -> Strategy:
    """`fedavg` of all but B, and the head where it is local; neither is sent in either direction."""
    asks = replace(recipe, keep=(*recipe.keep, "lora_b", *(["head"] if local_head else [])))
    return fedavg(recipe)._replace(init=factors.required, ask=lambda state, round, client: (asks, asks.sent(state)))
