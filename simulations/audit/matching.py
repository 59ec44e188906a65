"""Graph matching: the order that makes one symmetric matrix look like another, found without knowing where to begin.

    maximise    <A, B_p> = sum_ij A[i, j] B[p(i), p(j)]        over the orders p of n; A and B are (n, n)

Frank-Wolfe over doubly stochastic matrices from many random beginnings (FAQ; Vogelstein et al., PLOS ONE 10(4), 2015), each
ended by an assignment and by 2-opt: exchange two places while it helps.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from scipy.optimize import linear_sum_assignment

STEPS = 30    # of Frank-Wolfe, at most, from each beginning
LEAST = 1e-9  # of all that could be gained: what counts as a gain


def match(a: np.ndarray, b: np.ndarray, restarts: int, stream: Generator) -> list[np.ndarray]:
    """The orders int64 (n,) found from so many beginnings, the best first; one begins in the middle of all orders."""
    n = len(a)
    middle = np.full((n, n), 1 / n)
    starts = [middle, *((middle + stochastic(stream.random((n, n)))) / 2 for _ in range(restarts - 1))]
    found = [two_opt(a, b, frank_wolfe(a, b, start)) for start in starts]
    return sorted(found, key=lambda p: -score(a, b, p))


def score(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> float:
    """<A, B_p>."""
    return float((a * b[np.ix_(p, p)]).sum())


def frank_wolfe(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The order nearest to the doubly stochastic (n, n) that is reached uphill from x."""
    pull = a @ x @ b  # half the gradient of <x, a x b>
    for _ in range(STEPS):
        step = np.eye(len(x))[assign(pull)] - x
        change = a @ step @ b
        slope, bend = 2 * (step * pull).sum(), (step * change).sum()
        length = min(1.0, -slope / (2 * bend)) if bend < 0 else 1.0  # the highest point of a parabola on [0, 1]
        if length * slope <= LEAST * np.abs(pull).sum():
            break
        x, pull = x + length * step, pull + length * change
    return assign(x)


def two_opt(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p with the exchange made that helps most, again and again, until none helps."""
    p, least = p.copy(), LEAST * np.abs(a).sum() * np.abs(b).max()
    while True:
        gain = exchanges(a, b[np.ix_(p, p)])
        r, s = np.unravel_index(gain.argmax(), gain.shape)
        if gain[r, s] <= least:
            return p
        p[[r, s]] = p[[s, r]]


def exchanges(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, n): by how much <A, B> grows when places r and s of B are exchanged.

        sum_{k not r, s} 2 (a_rk - a_sk)(b_sk - b_rk)  +  (a_rr - a_ss)(b_ss - b_rr)
    """
    ends_a, ends_b = np.diagonal(a)[:, None], np.diagonal(b)[:, None]
    product = a @ b
    own = np.diagonal(product)
    every = product + product.T - own - own[:, None]  # the first sum over all k, halved
    crossing = (ends_a - a) * (b - ends_b) + (a - ends_a.T) * (ends_b.T - b)  # its terms at k = r and k = s
    return 2 * (every - crossing) - (ends_a - ends_a.T) * (ends_b - ends_b.T)


def assign(gain: np.ndarray) -> np.ndarray:
    """int64 (n,): the column of each row that makes the sum of gain[i, column[i]] largest."""
    return linear_sum_assignment(gain, maximize=True)[1]


def stochastic(x: np.ndarray) -> np.ndarray:
    """Positive (n, n) made doubly stochastic by dividing rows and columns in turn (Sinkhorn)."""
    for _ in range(20):
        x = x / x.sum(1, keepdims=True)
        x = x / x.sum(0)
    return x
