"""Krum and Multi-Krum (Blanchard et al., arXiv 1703.02757): the updates that lie closest to their neighbours.

    score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j        w <- w + mean of the ``keep`` updates of least score

f is the number of ``attackers`` withstood, for n >= 2 f + 3 clients; keep = 1 is Krum, more is Multi-Krum, at most
n - f - 2. All tensors of an update together are one point, so that the largest ones decide. Every client counts the same,
since the number of images is the client's own word. Krum's one update is one client's, with that client's bias.
"""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from fl.adapter import mean, move, norm, sub
from fl.config import ConfigError
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def krum(recipe: Recipe, attackers: NonNegativeInt = 1, keep: PositiveInt = 1) -> Strategy:
    """The mean of the ``keep`` most central updates, with at most so many ``attackers`` among the clients of a round."""

    needs = max(2 * attackers + 3, keep + attackers + 2)

    def apply(state, round, updates):
        sent = [u.adapter for u in updates]
        if len(sent) < needs:
            raise ConfigError(
                f"krum with attackers={attackers} and keep={keep} needs at least {needs} clients in a round, got {len(sent)}; "
                "raise clients or fraction, or lower strategy.attackers or strategy.keep"
            )
        near = len(sent) - attackers - 2
        far = [[norm(sub(a, b)) ** 2 if a is not b else 0.0 for b in sent] for a in sent]
        scores = [sum(sorted(row)[1 : near + 1]) for row in far]  # the first is the update's distance to itself
        best = sorted(range(len(sent)), key=lambda k: scores[k])[:keep]
        return move(state, mean([sent[k] for k in best], [1] * keep))

    return fedavg(recipe)._replace(linear=False, apply=apply, fewest=needs)
