"""A change of the frozen weights, module by module: as factors while they are smaller, dense from then on.

    <module>.lora_a.weight (R, d_in), <module>.lora_b.weight (d_out, R)      the change is B A
    <module>.weight (d_out, d_in)                                            the change itself

As in an adapter, the module's scale s = alpha / rank still stands before the change: it is the model's to know. Factors of
one step beside those of another, [B1 B2] and [A1; A2], are the factors of both.
"""

from __future__ import annotations

from functools import reduce
from typing import Iterable, NamedTuple, Sequence

import torch
from torch import Tensor

from fl.adapter import Adapter


class Names(NamedTuple):
    """What a module's tensors are called."""

    a: str
    b: str
    dense: str


def names(module: str) -> Names:
    """The tensors of ``module``, by name."""
    return Names(f"{module}.lora_a.weight", f"{module}.lora_b.weight", f"{module}.weight")


def modules(tensors: Iterable[str]) -> list[str]:
    """The modules that a change is of, each once."""
    return list(dict.fromkeys(n.removesuffix(".weight").removesuffix(".lora_a").removesuffix(".lora_b") for n in tensors))


def grow(base: Adapter, step: Adapter) -> Adapter:
    """Both changes together; inputs are not changed."""
    after = {}
    for module in modules((*base, *step)):
        a, b, dense = names(module)
        parts = [part for part in (base, step) if a in part or dense in part]
        if not any(dense in part for part in parts):
            after[a], after[b] = torch.cat([part[a] for part in parts]), torch.cat([part[b] for part in parts], dim=1)
            if after[a].numel() + after[b].numel() <= len(after[b]) * after[a].shape[1]:
                continue
            parts = [{a: after.pop(a), b: after.pop(b)}]
        like = next(iter(parts[0].values()))
        after[dense] = sum(product(part, module) for part in parts).to(like.dtype)
    return after


def numbered(steps: Sequence[Adapter]) -> Adapter:
    """Changes one after another under one roof, ``0.<name>``, ``1.<name>``, to travel in one message."""
    return {f"{i}.{name}": tensor for i, step in enumerate(steps) for name, tensor in step.items()}


def follow(base: Adapter, numbered: Adapter) -> Adapter:
    """``base`` grown by each of the `numbered` steps in their turn: to the bit what each as it came would have made of it."""
    steps: dict[int, dict[str, Tensor]] = {}
    for name, tensor in numbered.items():
        number, _, rest = name.partition(".")
        steps.setdefault(int(number), {})[rest] = tensor
    return reduce(grow, (steps[number] for number in sorted(steps)), base)


def product(change: Adapter, module: str) -> Tensor:
    """The change of ``module`` as one matrix (d_out, d_in), in float64."""
    a, b, dense = names(module)
    return change[dense].double() if dense in change else change[b].double() @ change[a].double()


def is_dense(change: Adapter) -> bool:
    """Whether some module's change is a matrix."""
    return any(names(module).dense in change for module in modules(change))
