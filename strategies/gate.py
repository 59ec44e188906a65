"""What an answer must satisfy before arithmetic sees it: each is judged alone, and one that is refused says why in a word."""

from __future__ import annotations

import math
from typing import Any, Literal, Mapping, get_args

import torch
from torch import Tensor

from fl.adapter import check_like, norm
from fl.recipe import Recipe
from fl.wire.flat import Codecs, Packed, WireError, float32_bytes, unpack
from strategies import ClientInfo, Update
from strategies.lengths import Length, measured

Code = Literal[
    "lost",          # the engine could not deliver the question, or the node is away
    "silent",        # no answer in time
    "client_error",  # the client says that it failed
    "size",          # more bytes than such an answer has
    "schema",        # not the records, facts or header that an answer has
    "stale",         # of another run, round, config or backbone
    "layout",        # other tensors, or of other shapes
    "non_finite",    # nan or inf
    "norm",          # an update that is too long
    "examples",      # a count of images that is not the roll call's
    "metrics",       # numbers that cannot be
    "seal",          # a sealed message that cannot be added
    "record",        # no signature of the run's record, from a node that has a key
]
CODES: tuple[Code, ...] = get_args(Code)
ALWAYS = ("loss", "steps", "seconds")
NO_LIMIT = Length(math.inf, math.inf)
COUNTS = ("examples", "correct", "steps")
HIGHEST = 1e6  # the loss of one image: what is summed over images and clients stays finite
LATEST = 1e9   # seconds
OWN = ("own_loss", "own_correct", "own_examples")  # of the client's own model, where it was asked to score it
SLACK = 4096  # bytes that an answer may have beyond twice its float32 form, whatever its codec


class Refused(ValueError):
    """An answer that is not taken. It names who sent it; ``code`` is the reason in a word, ``reason`` in a line."""

    def __init__(self, client: int | None, code: Code, reason: str, who: str = "") -> None:
        self.client, self.code, self.reason = client, code, legible(reason)
        super().__init__(f"{who or f'client {client}'}: {self.reason}")


def legible(text: str, longest: int = 500) -> str:
    """A stranger's ``text`` in one line of characters that can be printed: it goes to screens, logs and reports."""
    return "".join(c if c.isprintable() else " " for c in text[:longest])


def admit(
    update: Update, like: Mapping[str, Tensor], info: ClientInfo, longest: Length = NO_LIMIT, recipe: Recipe | None = None
) -> Update:
    """``update`` itself, if it is one of the client that ``info`` describes.

    Its names, shapes and dtypes are those of ``like``, its values finite, its norms at most ``longest``, its counts of images
    those of the roll call, its steps at most those of the ``recipe``. Raises Refused.
    """
    client = update.client
    steps = math.inf if recipe is None else steps_of(recipe, info)
    try:
        check_like(update.adapter, like)
    except ValueError as error:
        raise Refused(client, "layout", str(error)) from None
    long = norm(update.adapter)  # one pass for both: in float64 the squares of finite float32 values cannot add up to infinity
    if not math.isfinite(long):
        name = next(name for name, tensor in update.adapter.items() if not torch.isfinite(tensor).all())
        raise Refused(client, "non_finite", f"{name} must be finite, got nan or inf; lower the learning rate")
    for what, found, bound in zip(("update's norm", "variates' norm"), measured(update.adapter), longest):
        if found > bound:
            raise Refused(client, "norm", f"an {what} must be at most {bound:g}, as gate.norm says of the admitted ones, got {found:g}")
    most = {"loss": HIGHEST, "own_loss": HIGHEST * info.held, "seconds": LATEST}
    if not all(0 <= value <= most.get(name, 2**53) for name, value in update.metrics.items()):
        raise Refused(client, "metrics", f"metrics must be finite, not negative, and a loss at most {HIGHEST:g} an image, got {update.metrics}")
    if not 1 <= update.metrics["steps"] <= steps or update.metrics["steps"] % 1:
        raise Refused(client, "metrics", f"an update needs at least 1 step and at most {steps}, got {update.metrics['steps']}")
    if update.examples != info.examples:
        raise Refused(client, "examples", f"an update must be of the {info.examples} images of the roll call, got {update.examples}")
    correct, own = (update.metrics.get(f"own_{name}", info.held) for name in ("correct", "examples"))
    if not correct <= own == info.held:
        raise Refused(client, "metrics", f"its own model's score must be of its {info.held} images, got {correct:.0f} of {own:.0f}")
    return update


def update_of(client: int, facts: Mapping[str, Any], packed: Packed | None, codec: Codecs, like: Mapping[str, Tensor]) -> Update:
    """The update in an answer. Raises Refused when there is none that can be read, or none that is ``like`` what was asked.

    Names and shapes are compared before anything is decoded: a few bytes of low rank can be the factors of any matrix.
    """
    if packed is None:
        raise Refused(client, "schema", "an update must hold an adapter, got none")
    try:
        fitting(client, packed.shapes(), {name: tuple(tensor.shape) for name, tensor in like.items()})
        metrics = {name: number(facts["metrics"], name) for name in (*ALWAYS, *(OWN if "own_loss" in facts["metrics"] else ()))}
        return Update(client, unpack(packed, codec), number(facts, "examples"), metrics)
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise Refused(client, "schema", f"an update must hold an adapter, examples and metrics ({error})") from None


def steps_of(recipe: Recipe, info: ClientInfo) -> int:
    """How many steps a client takes under ``recipe``, at most."""
    return recipe.epochs * max(1, math.ceil(info.examples / recipe.batch))


def number(facts: Mapping[str, Any], name: str) -> float:
    """The number of this ``name``, a whole one for a count. Raises KeyError, and TypeError: no bool and no word is a number."""
    value, whole = facts[name], name.removeprefix("own_") in COUNTS
    if type(value) not in ((int,) if whole else (int, float)):
        raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, got {str(value)[:40]!r}")
    return value if whole else float(value)


def fitting(client: int, shapes: Mapping[str, tuple[int, ...]], must: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Refused, naming the first that differs, unless the ``shapes`` of an answer are what they ``must`` be."""
    for name in sorted({*shapes, *must}):
        if name not in must or name not in shapes:
            raise Refused(client, "layout", f"an update must hold what was asked for, but {name[:80]!r} is {'unexpected' if name in shapes else 'missing'}")
        if shapes[name] != must[name]:
            raise Refused(client, "layout", f"{name} must be {must[name]}, got {shapes[name]}")


def fresh(client: int, facts: Mapping[str, Any], must: Mapping[str, Any]) -> None:
    """Raise Refused unless an answer says that it is of this run, round, config and backbone: those of ``must``."""
    for name, value in must.items():
        if facts.get(name) != value:
            raise Refused(client, "stale", f"an answer must be of {name} {value}, got {str(facts.get(name))[:40]}")


def most(like: Mapping[str, Tensor]) -> int:
    """Bytes that an answer which holds tensors ``like`` these has, at most: what is more is not even decoded."""
    return 2 * float32_bytes(like) + SLACK


def readable(client: int, packed: Packed, bound: int) -> Packed:
    """``packed`` itself, unless it is larger than ``bound`` bytes or its header is none. Raises Refused."""
    if packed.nbytes > bound:
        raise Refused(client, "size", f"such an answer has at most {bound} bytes, got {packed.nbytes}")
    try:
        packed.check()
    except WireError as error:
        raise Refused(client, "schema", str(error)) from None
    return packed
