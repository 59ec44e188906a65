"""How the images are cut into clients: seeded, disjoint, covering, and no client without two images to train on.

The test images of each class are shared out as that class's training images were: a client is tested on what it is like,
and the sum over clients is still the accuracy on the whole test set. A partition file's builders return ``cut(labels, clients, rng) -> [indices of client 0, of client 1, ...]``. NumPy's
streams may differ between its versions; the digest of the split, compared at roll call, tells when they did.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from fl import durable
from fl.datasets import DataError
from fl.randomness import derive

Cut = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]
LEAST = 2  # a client with one image would send a one-image step


class Split(NamedTuple):
    """For each client the indices (int64) of its training, held-out and test images."""

    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]

    def digest(self) -> str:
        """Sixteen hex digits of SHA-256 over the whole manifest."""
        return hashlib.sha256(json.dumps(self.manifest()).encode()).hexdigest()[:16]

    def manifest(self) -> dict[str, list[list[int]]]:
        """The split as plain lists."""
        return {part: [indices.tolist() for indices in lists] for part, lists in self._asdict().items()}

    def save(self, path: Path) -> None:
        """Write the manifest and its digest as JSON."""
        durable.write(path, json.dumps({"digest": self.digest()} | self.manifest()))


def iid() -> Cut:
    """Equal shares of a shuffled deck."""

    def cut(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        return np.array_split(rng.permutation(len(labels)), clients)

    return cut


def dirichlet(alpha: PositiveFloat) -> Cut:
    """Each class is shared out in proportions drawn from Dirichlet(alpha, ..., alpha) (Hsu et al., arXiv 1909.06335)."""

    def cut(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        shares: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            edges = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(members)).astype(int)
            for share, piece in zip(shares, np.split(members, edges)):
                share.append(piece)
        return [np.concatenate(share) for share in shares]

    return cut


def shards(classes_per_client: PositiveInt) -> Cut:
    """Sort by label, cut into ``clients * k`` shards, give each client k of them (McMahan et al., arXiv 1602.05629)."""

    def cut(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        ordered = rng.permutation(len(labels))
        ordered = ordered[np.argsort(labels[ordered], kind="stable")]
        pieces = np.array_split(ordered, clients * classes_per_client)
        turn = rng.permutation(len(pieces)).reshape(clients, classes_per_client)
        return [np.concatenate([pieces[i] for i in row]) for row in turn]

    return cut


def quantity(alpha: PositiveFloat) -> Cut:
    """Every client sees all classes alike, but the sizes follow Dirichlet(alpha, ..., alpha)."""

    def cut(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        edges = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(labels)).astype(int)
        return np.split(rng.permutation(len(labels)), edges)

    return cut


def split(cut: Cut, train: Tensor, test: Tensor, clients: int, seed: int, validation: float = 0.0) -> Split:
    """Cut the training labels (n,) by ``cut``, and the test labels (m,) class by class in the same proportions.

    ``validation`` is the share of each client's training images that is held out, at least one image when above 0.
    Raises DataError when there are too few images for every client to have two to train on and one to test on.
    """
    rng = np.random.Generator(np.random.PCG64(derive(seed, "partition")))
    held = 1 if validation else 0
    if len(train) < clients * (LEAST + held) or len(test) < clients:
        raise DataError(
            f"{clients} clients need at least {clients * (LEAST + held)} training and {clients} test images, "
            f"got {len(train)} and {len(test)}; use fewer clients or more images"
        )
    shares = _fill(cut(train.numpy(), clients, rng), LEAST + held, rng)
    holds = [max(held, int(len(share) * validation)) for share in shares]
    holds = [min(hold, len(share) - LEAST) for hold, share in zip(holds, shares)]
    tests = _fill(_alike([train.numpy()[share] for share in shares], test.numpy(), rng), 1, rng)
    as_tensors = lambda lists: [torch.from_numpy(np.sort(indices).astype(np.int64)) for indices in lists]
    return Split(
        as_tensors([share[hold:] for share, hold in zip(shares, holds)]),
        as_tensors([share[:hold] for share, hold in zip(shares, holds)]),
        as_tensors(tests),
    )


def _alike(owned: list[np.ndarray], test: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices into ``test`` for each client: of every class the part that the client has among the labels ``owned``.

    A class that nobody trains on is shared out equally.
    """
    shares: list[list[np.ndarray]] = [[] for _ in owned]
    for label in np.unique(test):
        members = rng.permutation(np.flatnonzero(test == label))
        counts = np.array([np.count_nonzero(labels == label) for labels in owned])
        parts = np.cumsum(counts if counts.any() else np.ones(len(owned)))
        edges = np.rint(parts[:-1] / parts[-1] * len(members)).astype(int)
        for share, piece in zip(shares, np.split(members, edges)):
            share.append(piece)
    return [np.concatenate(share) for share in shares]


def _fill(shares: list[np.ndarray], least: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle each share, then move single images from the largest share until none has fewer than ``least``."""
    shares = [rng.permutation(share) for share in shares]
    for k in range(len(shares)):
        while len(shares[k]) < least:
            rich = max(range(len(shares)), key=lambda i: len(shares[i]))
            shares[k], shares[rich] = np.append(shares[k], shares[rich][-1]), shares[rich][:-1]
    return shares
