"""Linear probing: only the head trains. The floor that adaptation has to beat."""

from __future__ import annotations

from torch import nn

from fl.models import Method
from fl.models.lora import train_only


def linear() -> Method:
    """The head alone, d * classes + classes parameters."""

    def method(model: nn.Module, seed: int) -> None:
        train_only(model, ("head",))

    return method
