"""The parts of a config that every run has: what a machine sets for itself, and the bounds of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Node(BaseModel):
    """What one machine sets for itself; None leaves the run's own value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str | None = None
    seal_key: str | None = None
    data_root: str | None = None
    weights: str | None = None
    device: str | None = None
    state: str | None = None
    output: str | None = None
    rank: PositiveInt | None = None
    own: str | None = None
    node_key: str | None = None


class Seal(BaseModel):
    """The fixed point of blind aggregation, as `fl.wire.masks.Terms` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: Literal[12, 16, 32]
    largest: int = Field(ge=1)                          # images that a client weighs as, at most
    clip: float = Field(gt=0, allow_inf_nan=False)      # a weighted update's value, at most
    members: int = Field(ge=2)                          # clients in a sum, at least, or no client opens it


class Tell(BaseModel):
    """Decimals of the numbers that a blind server is told, at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    loss: int = Field(ge=0, le=6)
    accuracy: int = Field(ge=0, le=6)


class Checkpoint(BaseModel):
    """What is kept to go on from: after how many rounds, and how many, beside the most accurate."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every: int = Field(ge=0)                            # rounds; 0: never
    last: int = Field(ge=1)


class Gate(BaseModel):
    """The bounds that a client's answer must keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    norm: float = Field(ge=1, allow_inf_nan=False)      # of an update, in honest ones (strategies/lengths.py)
    examples: int = Field(ge=1)                         # images that a client may say it has
