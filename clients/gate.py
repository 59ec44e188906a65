"""What a server's message must satisfy before a client works on it: the other half of `strategies.gate`.

A client trusts the server with nothing but the order of rounds. What it may be asked is bounded by the config that it
composed itself.
"""

from __future__ import annotations

import re
from typing import Any, Mapping

import torch

from fl.adapter import Adapter, bare, group
from fl.config import Config
from fl.wire.flat import WireError

SLACK = 2**20  # bytes that a message may have beyond twice the full model: headers, sums of many rounds


def mark(facts: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What an answer says it is of: the message's run and round, and this client's own config.

    Raises WireError for a run that is no name, a round that is not in the run, and another config.
    """
    run, round, theirs = facts.get("run"), facts.get("round"), facts.get("config")
    if not (isinstance(run, str) and re.fullmatch(r"[a-z0-9_-]{1,128}", run)):
        raise WireError(f"a run's name must be of a-z, 0-9, _ and -, got {str(run)[:40]!r}")
    if not (type(round) is int and 1 <= round <= config.rounds):
        raise WireError(f"a round must be one of this run's {config.rounds}, got {str(round)[:40]}")
    if theirs != config.digest():
        raise WireError(f"a message must be of this client's config {config.digest()}, got {str(theirs)[:40]}")
    return {"run": run, "round": round, "config": theirs}


def past(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Up to which round nothing will be asked for again, and the last round of this client that counted. Raises WireError."""
    safe, counted = facts.get("safe"), facts.get("counted")
    if not all(type(n) is int and 0 <= n < facts["round"] for n in (safe, counted)):
        raise WireError(f"an order must say which rounds before it are safe and counted, got {str(safe)[:40]} and {str(counted)[:40]}")
    return safe, counted


def span(facts: Mapping[str, Any], config: Config) -> None:
    """Raise WireError unless the rounds that a blind server sends sums of are rounds of this run."""
    since, upto, safe = facts.get("since"), facts.get("upto"), facts.get("safe", 0)
    if not (all(type(n) is int for n in (since, upto, safe)) and 0 <= since <= upto <= config.rounds and 0 <= safe <= upto):
        raise WireError(f"sums must be of rounds of this run, got those after {str(since)[:40]} up to {str(upto)[:40]}")


def fitting(shapes: Mapping[str, tuple[int, ...]], start: Adapter) -> None:
    """Raise WireError unless these are shapes of the model that begins at ``start``: its names, its sides, up to a rank.

    To be asked before anything is decoded: a few bytes of low rank can be the factors of any matrix.
    """
    for name, shape in shapes.items():
        if group(name) == "base":
            continue  # float32, as long as it says: its size has been measured
        own = bare(name)
        if own not in start:
            raise WireError(f"an adapter must have the model's own tensors, got {own[:80]!r}, too")
        must = tuple(start[own].shape)
        if len(shape) != len(must) or any(side > whole if ranked(own) else side != whole for side, whole in zip(shape, must)):
            raise WireError(f"{own} must be {must}, got {shape}")


def finite(received: Adapter) -> Adapter:
    """``received`` itself, if all its values are finite. Raises WireError."""
    for name, tensor in received.items():
        if not torch.isfinite(tensor).all():
            raise WireError(f"{name[:80]} must be finite, got nan or inf")
    return received


def ranked(name: str) -> bool:
    """Whether a tensor is a factor, whose rank a client may have less of."""
    return group(name) in ("lora_a", "lora_b", "lora_r")
