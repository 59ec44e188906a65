"""What an update must satisfy before arithmetic sees it: each reply is judged alone."""

from __future__ import annotations

import math
from typing import Mapping

import torch
from torch import Tensor

from fl.adapter import check_like
from strategies import ClientInfo, Update

ALWAYS = ("loss", "steps", "seconds")
OWN = ("own_loss", "own_correct", "own_examples")  # of the client's own model, where it was asked to score it


class Refused(ValueError):
    """An update that must not be aggregated; it names the client and the reason."""


def admit(update: Update, like: Mapping[str, Tensor], info: ClientInfo) -> Update:
    """``update`` itself, if it is one of the client that ``info`` describes.

    Its names, shapes and dtypes are those of ``like``, its values finite, its counts of images those of the roll call.
    Raises Refused.
    """
    try:
        check_like(update.adapter, like)
    except ValueError as error:
        raise Refused(f"client {update.client}: {error}") from None
    for name, tensor in update.adapter.items():
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():  # the sum is quick, and inf for huge values, too
            raise Refused(f"client {update.client}: {name} must be finite, got nan or inf; lower the learning rate")
    if not all(math.isfinite(value) and value >= 0 for value in update.metrics.values()):
        raise Refused(f"client {update.client}: metrics must be finite and not negative, got {update.metrics}")
    if update.metrics["steps"] < 1:
        raise Refused(f"client {update.client}: an update needs at least 1 step, got {update.metrics['steps']}")
    if update.examples != info.examples:
        raise Refused(
            f"client {update.client}: an update must be of the {info.examples} images of the roll call, got {update.examples}"
        )
    correct, own = (update.metrics.get(f"own_{name}", 0) for name in ("correct", "examples"))
    if not correct <= own or own not in (0, info.held):
        raise Refused(f"client {update.client}: its own model's score must be of its {info.held} images, got {correct:.0f} of {own:.0f}")
    return update
