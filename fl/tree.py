"""What is nested in tuples and mappings, as named tensors and back, so that it can be written down.

`named` and `nested` are for a tree whose shape both sides know; `described` and `rebuilt` write the shape down, too, with the
numbers and words that stand at its ends.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Mapping

from torch import Tensor

from fl.flat import Flat

ROOMS = ("fl.", "strategies.")  # whose named tuples a tree may hold: nothing else is imported for one that was written down


def named(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of ``tree`` under its path, as in ``1/head.weight``. Raises TypeError for what is no tensor at its end."""
    if isinstance(tree, Tensor):
        return {path: tree}
    parts = _parts(tree)
    return {name: t for key, part in parts for name, t in named(part, f"{path}/{key}" if path else str(key)).items()}


def nested(like: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """The tree that `named` took apart; ``like`` is one that is nested alike. Raises KeyError when a tensor is missing."""
    if isinstance(like, Tensor):
        return tensors[path]
    parts = [(key, nested(part, tensors, f"{path}/{key}" if path else str(key))) for key, part in _parts(like)]
    if isinstance(like, Mapping):
        return dict(parts)
    values = [part for _, part in parts]
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def described(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The shape of ``tree`` as JSON, and its tensors by number; what stands in it twice is there once.

    Its ends are tensors, numbers, words and None; its knots mappings, tuples, lists and named tuples of this project. Raises
    TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}

    def number(tensor: Tensor) -> str:
        if id(tensor) not in seen:
            seen[id(tensor)] = str(len(tensors))
            tensors[seen[id(tensor)]] = tensor
        return seen[id(tensor)]

    def shape(part: Any) -> Any:
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        if isinstance(part, Tensor):
            return {"tensor": number(part)}
        if isinstance(part, Flat):
            return {"flat": number(part.buffer), "layout": part.layout}
        if isinstance(part, Mapping):
            return {"mapping": [[shape(key), shape(value)] for key, value in part.items()]}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return {"named": f"{type(part).__module__}:{type(part).__qualname__}", "parts": [shape(p) for p in part]}
        if isinstance(part, (tuple, list)):
            return {type(part).__name__: [shape(p) for p in part]}
        raise TypeError(f"a state must be of tensors, numbers, mappings and tuples, got {type(part).__name__}")

    return shape(tree), tensors


def rebuilt(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `described` took apart. Raises KeyError, TypeError or ValueError for what it did not write."""
    if not isinstance(shape, dict):
        return shape
    if "tensor" in shape:
        return tensors[shape["tensor"]]
    if "flat" in shape:
        return Flat(tensors[shape["flat"]], tuple((name, tuple(sides)) for name, sides in shape["layout"]))
    if "mapping" in shape:
        pairs = ((rebuilt(key, tensors), rebuilt(value, tensors)) for key, value in shape["mapping"])
        return dict(pairs)
    if "named" in shape:
        return _kind(shape["named"])(*(rebuilt(part, tensors) for part in shape["parts"]))
    kind = {"tuple": tuple, "list": list}[next(iter(shape))]
    return kind(rebuilt(part, tensors) for part in next(iter(shape.values())))


def _kind(name: str) -> type:
    module, _, kind = name.partition(":")
    found = getattr(import_module(module), kind, None) if module.startswith(ROOMS) else None
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise ValueError(f"a state may hold named tuples of this project, got {name[:80]!r}")
    return found


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple):
        return list(enumerate(tree))
    raise TypeError(f"a state must be of tensors, mappings and tuples, got {type(tree).__name__}")
