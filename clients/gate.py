"""What a server's message must satisfy before a client works on it: the other half of `strategies.gate`.

A client trusts the server with nothing but the order of rounds. What it may be asked is bounded by the config that it
composed itself.
"""

from __future__ import annotations

import re
from typing import Any, Mapping

import torch

from fl.adapter import RIDERS, Adapter, apart, bare, group
from fl.config import Config
from fl.recipe import Recipe
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


def recipe_of(facts: Mapping[str, Any], config: Config) -> Recipe:
    """The recipe in an order. Raises WireError when there is none, or when it asks for more work than the config does."""
    try:
        recipe = Recipe.from_json(facts["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"an order must hold a recipe, got none that can be read ({' '.join(str(error).split())[:200]})") from None
    own = config.recipe
    if recipe.epochs > own.epochs or recipe.batch != own.batch or recipe.deadline > own.deadline and own.deadline:
        raise WireError(f"an order must keep the config's epochs={own.epochs}, batch={own.batch} and deadline={own.deadline:g}, got {recipe.epochs}, {recipe.batch} and {recipe.deadline:g}")
    return recipe


def admit(received: Adapter, start: Adapter) -> Adapter:
    """``received`` itself, if it is one for the model that begins at ``start``: its names, shapes up to a rank, finite values.

    Raises WireError.
    """
    parts = apart(received)
    for name, tensor in (*parts.own.items(), *parts.control.items()):
        if name not in start:
            raise WireError(f"an adapter must have the model's own tensors, got {name[:80]!r}, too")
        must = start[name].shape
        if tensor.dim() != len(must) or any(side > whole if ranked(name) else side != whole for side, whole in zip(tensor.shape, must)):
            raise WireError(f"{name} must be {tuple(must)}, got {tuple(tensor.shape)}")
    for name, tensor in received.items():
        if not torch.isfinite(tensor).all():
            raise WireError(f"{name[:80]} must be finite, got nan or inf")
    return received


def ranked(name: str) -> bool:
    """Whether a tensor is a factor, whose rank a client may have less of."""
    return group(bare(name) if group(name) in RIDERS else name) in ("lora_a", "lora_b", "lora_r")
