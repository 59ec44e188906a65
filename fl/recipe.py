"""Recipe: everything that a server may ask of a client's training.

It stands apart from `fl.learn` so that the server can write a recipe without being able to import a training loop.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Annotated, Literal, Protocol

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from fl.adapter import Adapter, Group, bare, group

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Point = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """One client's orders for one round. A field out of type or range raises pydantic's ValidationError, a ValueError.

    ``lr`` maps a parameter group of `fl.adapter.group` to its peak learning rate. ``span`` is the part of the whole
    run that this round covers, in [0, 1]; the learning rate follows warm-up and cosine over the run, not the round:
    ``lr(t) = peak * max(t, 0.001) / warmup``, at most ``peak``, for ``t < warmup``, else ``peak * (1 + cos(pi * (t -
    warmup) / (1 - warmup))) / 2``. ``batch`` is at least 2, since a one-image step can give the image away. ``mu`` is
    the proximal weight of FedProx: the loss gains ``mu / 2 * |w - w_received|^2``. ``clip`` bounds the norm of the
    whole gradient; 0 turns it off. ``groups`` are those that train this round; () is all that the method trains. Those of
    ``keep`` train and stay at home: a client takes them from its own state, first from what it received or else started
    with, and does not send them back. ``control`` is SCAFFOLD: variates travel beside the weights, both ways
    (`strategies.scaffold`). ``deadline`` is the seconds after which training stops, at least one step old, with what it has; 0
    is none, and only without one is a round the same on every machine.
    """

    lr: dict[str, Amount]
    optimizer: Literal["adamw", "sgd"] = "adamw"
    epochs: PositiveInt = 1
    batch: Annotated[int, Field(ge=2)] = 32
    weight_decay: Amount = 0.0
    momentum: Share = 0.9
    warmup: Share = 0.1
    cosine: bool = True
    clip: Amount = 1.0
    mu: Amount = 0.0
    augment: bool = False
    span: tuple[Point, Point] = (0.0, 1.0)
    groups: tuple[Group, ...] = ()
    keep: tuple[Group, ...] = ()
    control: bool = False
    deadline: Amount = 0.0

    def sent(self, adapter: Adapter) -> Adapter:
        """Of ``adapter`` what an update under this recipe holds: what is of ``groups`` and not of ``keep``, with its riders."""
        if not self.groups and not self.keep:
            return adapter
        chosen = {n: group(bare(n)) for n in adapter}
        return {n: adapter[n] for n, g in chosen.items() if (not self.groups or g in self.groups) and g not in self.keep}

    def to_json(self) -> str:
        """The recipe as one JSON object; `from_json` reads it back equal."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe written by `to_json`. Raises ValueError on unknown or missing fields and on bad values."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(Recipe)}:
            raise ValueError("a recipe must hold exactly the fields of fl.recipe.Recipe; do both sides run one version?")
        return Recipe(**values)


class Rates(Protocol):
    """Of a recipe what says how its learning rates change; as in `Recipe`."""

    span: tuple[float, float]
    warmup: float
    cosine: bool


def schedule(recipe: Rates, progress: float) -> float:
    """The share of the peak learning rate at ``progress`` in [0, 1) of this round: warm-up, then cosine, over the run."""
    low, high = recipe.span
    t = low + (high - low) * progress
    if t < recipe.warmup:
        return min(1.0, max(t, 1e-3) / recipe.warmup)  # never quite zero, so that the first step is one
    return (1 + math.cos(math.pi * (t - recipe.warmup) / (1 - recipe.warmup))) / 2 if recipe.cosine else 1.0
