"""What an update must satisfy before arithmetic sees it: each reply is judged alone."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor

from fl.adapter import check_like
from strategies import Update


class Refused(ValueError):
    """An update that must not be aggregated; it names the client and the reason."""


def admit(update: Update, like: Mapping[str, Tensor]) -> Update:
    """``update`` itself, if its names, shapes and dtypes are those of ``like``, its values finite, its count positive."""
    try:
        check_like(update.adapter, like)
    except ValueError as error:
        raise Refused(f"client {update.client}: {error}") from None
    for name, tensor in update.adapter.items():
        if not torch.isfinite(tensor).all():
            raise Refused(f"client {update.client}: {name} must be finite, got nan or inf; lower the learning rate")
    if update.examples < 1:
        raise Refused(f"client {update.client}: an update needs at least 1 example, got {update.examples}")
    return update
