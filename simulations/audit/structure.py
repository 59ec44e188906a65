"""The order of a block's values as updates of the patch embedding betray it.

An update is a sum over patches of (what came back) x (the encrypted patch), so that its columns vary together as the values
of encrypted blocks do. With rows that are noise of an unknown covariance S, and C that of plain blocks, known from any
public images,

    U_k ~ N(0, S x C_p),   C_p[i, j] = C[p(i), p(j)]      k: the updates, (d, n) each
    surprise(p) = log det( sum_k U_k C_p^-1 U_k^T + ridge )                 least at the cipher's order p

(the matrix normal's likelihood, S put at its own best value). log det is concave: with S held, a step is a graph matching of
G = sum_k U_k^T S^-1 U_k with -C^-1, and what is gained there is gained here ("flip-flop"; Dutilleul, J. Stat. Comput. Simul.
64, 1999). That criterion is sharp and hard to climb; one that is blunt says where to begin, the distances between columns,

    D_ij = log |u_i - u_j|^2        of rows made white by S, matched to log E|x_i - x_j|^2 of plain blocks.
"""

from __future__ import annotations

import itertools
from typing import Sequence

import numpy as np
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import pixel_unshuffle as to_blocks

from simulations.audit.matching import match, two_opt

CHAINS = 12     # independent searches
FLIPS = 6       # of S and p, in each
RESTARTS = 60   # of the blunt matching, in each flip
FINALISTS = 20  # of them that the sharp criterion sees
RIDGE = 0.03    # of S, in its mean variances: an aggregate has fewer columns than S has rows
GRAIN = 1.0     # of C, likewise: with less, the criterion is sharper and harder to climb


def covariance(images: Tensor, block: int) -> np.ndarray:
    """C of plain uint8 images (m, 3, h, w), over all their blocks, values in the order of a patch embedding's columns."""
    values = to_blocks(images.double() / 255, block).transpose(0, 1).flatten(1).numpy()
    found = np.cov(values)
    return found / found.trace() * len(found) + GRAIN * np.eye(len(found))


def recover(updates: Sequence[np.ndarray], plain: np.ndarray, stream: Generator, chains: int = CHAINS) -> np.ndarray:
    """int64 (n,): the order p that surprises least; value j of an encrypted block looks like value p[j] of a plain one."""
    size = sum(float((u**2).sum()) for u in updates)
    updates = [u / size**0.5 for u in updates]
    inverse, far = np.linalg.inv(plain), distances(plain)
    found = [chain(updates, inverse, far, stream) for _ in range(chains)]
    return min(found, key=lambda p: surprise(updates, inverse, p))


def chain(updates: Sequence[np.ndarray], inverse: np.ndarray, far: np.ndarray, stream: Generator) -> np.ndarray:
    """One search: S and p in turn, until p stays."""
    best, white = None, np.eye(len(updates[0]))
    for _ in range(FLIPS):
        seen = [white @ u for u in updates]
        gram = sum(u.T @ u for u in seen)
        near = standard(np.mean([distances(u.T @ u) for u in seen], axis=0))
        starts = match(near, standard(far), RESTARTS, stream)[:FINALISTS] + ([] if best is None else [best])
        before, best = best, min((two_opt(gram, -inverse, p) for p in starts), key=lambda p: surprise(updates, inverse, p))
        if before is not None and (before == best).all():
            break
        values, vectors = np.linalg.eigh(rows(updates, inverse, best))
        white = vectors.T / np.sqrt(values)[:, None]
    return best


def rows(updates: Sequence[np.ndarray], inverse: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(d, d): S, up to a factor, if p is the order; updates are of total norm 1."""
    middle, d = inverse[np.ix_(p, p)], len(updates[0])
    return sum(u @ middle @ u.T for u in updates) + RIDGE / d * np.eye(d)


def surprise(updates: Sequence[np.ndarray], inverse: np.ndarray, p: np.ndarray) -> float:
    """log det of S: how ill the updates go with p."""
    return float(np.linalg.slogdet(rows(updates, inverse, p))[1])


def distances(gram: np.ndarray) -> np.ndarray:
    """log |x_i - x_j|^2 of vectors with these inner products, off the diagonal; 0 on it."""
    own = np.diagonal(gram)
    squares = own[:, None] + own - 2 * gram
    return np.log(np.where(np.eye(len(gram)), 1, np.maximum(squares, 1e-12 * own.mean())))


def standard(x: np.ndarray) -> np.ndarray:
    """x with mean 0 and sd 1 off the diagonal, and 0 on it."""
    off = ~np.eye(len(x), dtype=bool)
    return np.where(off, (x - x[off].mean()) / x[off].std(), 0)


def symmetries(block: int) -> np.ndarray:
    """int64 (48, 3 block^2): the orders that turn, mirror and recolour a block; plain images look nearly alike under them."""
    plain = np.arange(3 * block * block).reshape(3, block, block)
    sides = [turned for k in range(4) for turned in (np.rot90(plain, k, (1, 2)), np.rot90(plain, k, (1, 2))[:, :, ::-1])]
    return np.array([side[list(colours)].ravel() for side in sides for colours in itertools.permutations(range(3))])


def shares(found: np.ndarray, secret: np.ndarray, likes: np.ndarray) -> tuple[float, float]:
    """exact: the share of places found; sym: the same after the best of the ``likes`` (k, n) of ``found``."""
    return float((found == secret).mean()), float((likes[:, found] == secret).mean(1).max())


def chance(likes: np.ndarray, draws: int = 5000) -> dict[str, list[float]]:
    """Mean and 99th percentile of exact and sym for orders drawn at random: what one gets who knows nothing."""
    stream, n = np.random.default_rng(0), likes.shape[1]
    found = np.array([shares(stream.permutation(n), np.arange(n), likes) for _ in range(draws)])
    return {name: [values.mean(), np.quantile(values, 0.99)] for name, values in zip(("exact", "sym"), found.T)}
