"""An honest server that looks closely, and what it makes of one client's update: which classes, how many of each, which pictures.

    class       the gradient of the head's bias is p_c - y_c, so the bias of a class that is there goes up: score = db_c
    histogram   share of class c ~ ridge regression on what the head did for it, fitted to rounds that the server trains itself,
                on public pictures whose classes it draws; then cut at 0 and divided by the sum
    fitted      is a class there? the regression's share of it, as a score
    member      loss of a picture before the update minus after it: pictures that were trained on gain more

All three need the public start, the public backbone and public pictures, and no key: with a keyed start an update is that
of plain training, so that plain pictures can be tried on it.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clients import local
from fl.adapter import Adapter, add
from fl.datasets import Examples

BIAS, WEIGHT = "head.bias", "head.weight"


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The area under the ROC curve: how often a score of the ``positive`` is above one of the ``negative``, ties counted half."""
    wins = np.sign(np.subtract.outer(positive, negative))
    return float(0.5 + wins.mean() / 2)


def histogram(labels: Tensor, classes: int) -> np.ndarray:
    """The share of each class, float64 (classes,)."""
    return torch.bincount(labels, minlength=classes).double().numpy() / len(labels)


def variation(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two histograms: half the sum of the absolute differences, 0 to 1."""
    return float(np.abs(a - b).sum() / 2)


def features(update: Adapter, images: int) -> np.ndarray:
    """The head's change for each class, beside that for the others, float64 (classes, features)."""
    own, rows = update[BIAS].double().numpy(), update[WEIGHT].double()
    length, along = rows.norm(dim=1).numpy(), (rows @ rows.mean(0)).numpy()
    order = own.argsort().argsort() / len(own)
    return np.stack([own, own**2, own**3, own - own.mean(), order, length, along, own * length, own * np.log(images), np.ones_like(own)], axis=1)


class Histograms:
    """The regression: fitted to updates whose histograms are known, float64 (classes,) each, and their numbers of images."""

    def __init__(self, known: Sequence[tuple[Adapter, int, np.ndarray]], ridge: float = 1e-2) -> None:
        rows = np.concatenate([features(update, images) for update, images, _ in known])
        shares = np.concatenate([share for *_, share in known])
        self._scale = np.abs(rows).max(axis=0) + 1e-12
        rows = rows / self._scale
        self._weights = np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ shares)

    def scores(self, update: Adapter, images: int) -> np.ndarray:
        """The share of each class as the regression has it, float64 (classes,); it may be negative."""
        return features(update, images) / self._scale @ self._weights

    def guess(self, update: Adapter, images: int) -> np.ndarray:
        """The histogram behind an ``update``; the uniform one where nothing is left."""
        found = self.scores(update, images).clip(0)
        return found / found.sum() if found.sum() > 0 else np.full(len(found), 1 / len(found))


def losses(client: local.Client, adapter: Adapter, examples: Examples) -> np.ndarray:
    """The cross-entropy of each picture under ``adapter``, float64 (n,), as ``client``'s plain model has it."""
    local.put(client, adapter)
    client.bench.model.eval()
    device = next(client.bench.model.parameters()).device
    with torch.no_grad():
        each = [
            cross_entropy(client.bench.forward(client.prepare(images).to(device)), labels.to(device), reduction="none").cpu()
            for images, labels in zip(examples.images.split(250), examples.labels.split(250))
        ]
    return torch.cat(each).double().numpy()


def membership(client: local.Client, start: Adapter, update: Adapter, members: Examples, others: Examples) -> float:
    """The AUC of telling the ``members`` of a client's training pictures from ``others``, by an ``update`` from ``start``."""
    after = add(start, update)
    gains = (losses(client, start, examples) - losses(client, after, examples) for examples in (members, others))
    return auc(*gains)
