"""FedNova (Wang et al., arXiv 2007.07481): a client that took more steps does not pull the mean towards itself.

    w <- w + tau_eff sum_k p_k (w_k - w) / tau_k        tau_eff = sum_k p_k tau_k        p_k = n_k / sum_j n_j

tau_k is the sum of the weights with which the client's gradients enter its update: its steps, and under SGD with momentum
rho (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho). For AdamW, steps are a heuristic. With equal steps it is FedAvg.
Not declared linear: the example-weighted sum of the uploads alone does not give it; a client that divided its own upload
by tau_k would make it so.
"""

from __future__ import annotations

from fl.adapter import mean, move
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def fednova(recipe: Recipe) -> Strategy:
    """The mean of the updates per step, times the mean number of steps."""

    def apply(state, round, updates):
        updates = list(updates)
        lengths = [length(recipe, u.metrics["steps"]) for u in updates]
        per_step = [{name: t / tau for name, t in u.adapter.items()} for u, tau in zip(updates, lengths)]
        step = mean(per_step, [u.examples for u in updates])
        effective = sum(u.examples * tau for u, tau in zip(updates, lengths)) / sum(u.examples for u in updates)
        return move(state, {name: effective * t for name, t in step.items()})

    return fedavg(recipe)._replace(linear=False, apply=apply)


def length(recipe: Recipe, steps: float) -> float:
    """tau of a client that took so many steps under ``recipe``."""
    rho = recipe.momentum if recipe.optimizer == "sgd" else 0.0
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
