"""A strategy's state as named tensors and back: what is nested in tuples and mappings, flat, so that it can be written down."""

from __future__ import annotations

from typing import Any, Mapping

from torch import Tensor


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


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple):
        return list(enumerate(tree))
    raise TypeError(f"a state must be of tensors, mappings and tuples, got {type(tree).__name__}")
