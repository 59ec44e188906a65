"""Recipe: everything that a server may ask of a client's training.

It stands apart from `fl.learn` so that the server can write a recipe without being able to import a training loop.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Mapping

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """One client's orders for one round.

    ``lr`` maps a parameter group of `fl.adapter.group` to its peak learning rate. ``span`` is the part of the whole
    run that this round covers, in [0, 1]; the learning rate follows warm-up and cosine over the run, not the round:
    ``lr(t) = peak * t / warmup`` for ``t < warmup``, else ``peak * (1 + cos(pi * (t - warmup) / (1 - warmup))) / 2``.
    ``mu`` is the proximal weight of FedProx: the loss gains ``mu / 2 * |w - w_received|^2``.
    ``clip`` bounds the norm of the whole gradient; 0 turns it off.
    """

    optimizer: str = "adamw"
    lr: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 1
    batch: int = 32
    weight_decay: float = 0.0
    momentum: float = 0.9
    warmup: float = 0.1
    cosine: bool = True
    clip: float = 1.0
    mu: float = 0.0
    augment: bool = False
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Raise ValueError on the first field that is out of range."""
        rules = {
            "optimizer": (self.optimizer in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}"),
            "lr": (bool(self.lr) and all(v >= 0 for v in self.lr.values()), "needs a rate >= 0 for each group"),
            "epochs": (self.epochs >= 1, "must be at least 1"),
            "batch": (self.batch >= 2, "must be at least 2, since a one-image step can give the image away"),
            "weight_decay": (self.weight_decay >= 0, "must be >= 0"),
            "momentum": (0 <= self.momentum < 1, "must be in [0, 1)"),
            "warmup": (0 <= self.warmup < 1, "must be in [0, 1)"),
            "clip": (self.clip >= 0, "must be >= 0"),
            "mu": (self.mu >= 0, "must be >= 0"),
            "span": (0 <= self.span[0] <= self.span[1] <= 1, "must be an interval inside [0, 1]"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"recipe.{name} {rule}, got {getattr(self, name)!r}")

    def to_json(self) -> str:
        """The recipe as one JSON object; `from_json` reads it back equal."""
        return json.dumps(asdict(self) | {"lr": dict(self.lr)})

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe written by `to_json`. Raises ValueError on unknown or missing fields and on bad values."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(Recipe)}:
            raise ValueError("a recipe must hold exactly the fields of fl.recipe.Recipe; do both sides run one version?")
        return Recipe(**values | {"span": tuple(values["span"])})
