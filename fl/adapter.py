"""Adapter: the trainable tensors under the model's own names, and the small arithmetic on them.

What trains is said once, by ``requires_grad``; what is sent, averaged, saved and counted is derived from it here.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Literal, Mapping, NamedTuple, Sequence, get_args

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from fl import durable
from fl.flat import Flat, Layout

Adapter = Mapping[str, Tensor]

PATCH_EMBED = "patch_embed.proj.weight"
Group = Literal["lora_a", "lora_b", "lora_r", "patch_embed", "head", "backbone"]
GROUPS: tuple[Group, ...] = get_args(Group)
RIDERS = ("control", "base")  # travel beside the weights, as control.<name>: control variates, a change of what is frozen
SEALED = "sealed"             # travels in their place, as sealed.<name>: bytes that a server adds and cannot read
_KINDS = (*GROUPS, *RIDERS, SEALED)


class Parts(NamedTuple):
    """A message taken apart: the weights, and what rode along under its bare names."""

    own: Adapter
    control: Adapter
    base: Adapter


def group(name: str) -> str:
    """The parameter group of a tensor, one of ``GROUPS``, or of ``RIDERS``, or ``SEALED``: rates, bytes and codecs go by it."""
    parts = name.split(".")
    return parts[0] if parts[0] in (*RIDERS, SEALED) else next((g for g in GROUPS if g in parts), "backbone")


def bare(name: str) -> str:
    """The name of the weights that a rider is about; any other name itself."""
    return name.partition(".")[2] if group(name) in RIDERS else name


def ride(rider: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """``tensors`` named as what rides along in a message."""
    return {f"{rider}.{name}": tensor for name, tensor in tensors.items()}


def apart(adapter: Adapter) -> Parts:
    """What `ride` put together; an adapter without riders is its own part as it is."""
    riders = {rider: {bare(n): t for n, t in adapter.items() if group(n) == rider} for rider in RIDERS}
    own = {n: t for n, t in adapter.items() if group(n) not in RIDERS} if any(riders.values()) else adapter
    return Parts(own, **riders)


def ordered(names: Iterable[str]) -> list[str]:
    """``names`` as they stand in a buffer and in a message: by group, then by name."""
    return sorted(names, key=lambda n: (_KINDS.index(group(n)), n))


def flat(tensors: Mapping[str, Tensor], lead: int = 0) -> Flat:
    """A copy of the tensors in one buffer, detached, on their device; they are of one dtype.

    Where their first ``lead`` (0 or 1) dimension is that of clients, it is the buffer's, too.
    """
    names = ordered(tensors)
    parts = [tensors[n].detach().flatten(lead) for n in names]
    return Flat(torch.cat(parts, dim=-1) if parts else torch.zeros(0), tuple((n, tuple(tensors[n].shape[lead:])) for n in names))


def cut(adapter: Adapter, layout: Layout) -> Adapter | None:
    """Of ``adapter`` what lies as ``layout`` says, a larger tensor cut to its first rows and columns; None where it lacks any."""
    found = {n: adapter[n][tuple(slice(side) for side in shape)] for n, shape in layout if n in adapter and adapter[n].dim() == len(shape)}
    return flat(found) if [(n, tuple(t.shape)) for n, t in found.items()] == list(layout) else None


def read(model: nn.Module) -> Adapter:
    """A copy of the model's trainable parameters, on the CPU."""
    copy = flat({n: p for n, p in model.named_parameters() if p.requires_grad})
    return Flat(copy.buffer.cpu(), copy.layout)


def write(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Set the model's trainable parameters. Raises ValueError naming the first name or shape that does not fit."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check_like(adapter, own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter[name])


def read_rows(model: nn.Module) -> list[Flat]:
    """`read` of each of the C clients whose parameters in ``model`` are (C, ...)."""
    copy = flat({n: p for n, p in model.named_parameters() if p.requires_grad}, lead=1)
    return [Flat(row, copy.layout) for row in copy.buffer.cpu()]


def write_rows(model: nn.Module, given: Sequence[Adapter]) -> None:
    """`write` for each of the C clients whose parameters in ``model`` are (C, ...). Raises ValueError as it does."""
    rows = [flat(adapter) for adapter in given]
    for row in rows:
        check_like(row, rows[0])
    write(model, Flat(torch.stack([row.buffer for row in rows]), rows[0].layout))


@contextmanager
def only(model: nn.Module, chosen: Sequence[Group]) -> Iterator[None]:
    """For a while, of the parameters that train let only those of the ``chosen`` groups do so; none chosen means all."""
    still = [p for n, p in model.named_parameters() if p.requires_grad and chosen and group(n) not in chosen]
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def check_like(adapter: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    if alike(adapter, like):
        return
    for name in sorted(set(adapter) ^ set(like)):
        raise ValueError(f"adapters must hold the same tensors: {name!r} is {'unexpected' if name in adapter else 'missing'}")
    for name, tensor in adapter.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            got, must = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like[name]))
            raise ValueError(f"{name} must be {must}, got {got}")


def alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both lie in a buffer in the same way, so that arithmetic may run over the buffers."""
    return isinstance(a, Flat) and isinstance(b, Flat) and a.layout == b.layout and a.buffer.dtype == b.buffer.dtype


def add(a: Adapter, b: Adapter) -> Adapter:
    """a + b, tensor by tensor."""
    check_like(a, b)
    return Flat(a.buffer + b.buffer, a.layout) if alike(a, b) else {n: a[n] + b[n] for n in a}


def sub(a: Adapter, b: Adapter) -> Adapter:
    """a - b, tensor by tensor."""
    check_like(a, b)
    return Flat(a.buffer - b.buffer, a.layout) if alike(a, b) else {n: a[n] - b[n] for n in a}


def part(adapter: Adapter, chosen: Sequence[Group]) -> Adapter:
    """The tensors of the ``chosen`` groups, themselves; none chosen means all."""
    return adapter if not chosen else {n: t for n, t in adapter.items() if group(n) in chosen}


def move(adapter: Adapter, step: Adapter) -> Adapter:
    """``adapter`` plus ``step``, which may hold some of its tensors only."""
    if alike(adapter, step):
        return add(adapter, step)
    check_like(step, {n: adapter[n] for n in step if n in adapter})
    moved = flat(adapter)
    for name, tensor in step.items():
        moved[name].add_(tensor)
    return moved


def mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """`average` of adapters with a weight for each. Raises ValueError as it does, and when their numbers differ."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"a mean needs adapters and a weight for each, got {len(adapters)} and {len(weights)}")
    return average(zip(adapters, weights))


def average(weighted: Iterable[tuple[Adapter, float]]) -> Adapter:
    """``sum_k w_k a_k / sum_k w_k``, added in the order given, each adapter looked at once: one buffer, however many come.

    Raises ValueError for no adapters (the mean of nothing is no zero), and for weights that are negative or all zero.
    """
    total, result = 0.0, None
    for adapter, weight in weighted:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights must be >= 0 and finite, got {weight}")
        total += weight
        if result is None:
            whole = isinstance(adapter, Flat)
            result = Flat(adapter.buffer * weight, adapter.layout) if whole else {n: t * weight for n, t in adapter.items()}
            continue
        check_like(adapter, result)
        if alike(adapter, result):
            result.buffer.add_(adapter.buffer, alpha=weight)
        else:
            for name, tensor in adapter.items():
                result[name].add_(tensor, alpha=weight)
    if result is None or total == 0:
        raise ValueError(f"a mean needs adapters whose weights have a positive sum, got {'none' if result is None else total}")
    for tensor in [result.buffer] if isinstance(result, Flat) else result.values():
        tensor.div_(total)
    return result


def norm(adapter: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all values together, in float64."""
    tensors = [adapter.buffer] if isinstance(adapter, Flat) else adapter.values()
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in tensors))


def norms(adapter: Mapping[str, Tensor]) -> dict[str, float]:
    """`norm` of each group that is present."""
    found: dict[str, list[Tensor]] = {g: [] for g in groups(adapter)}
    for name, tensor in adapter.items():
        found[group(name)].append(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
    return {g: float(torch.stack(values).norm()) for g, values in found.items()}


def groups(names: Iterable[str]) -> list[str]:
    """The groups present, in the order of ``GROUPS``, and after them the riders."""
    present = {group(n) for n in names}
    return [g for g in (*GROUPS, *RIDERS) if g in present]


def count(adapter: Mapping[str, Tensor]) -> int:
    """How many parameters."""
    return sum(t.numel() for t in adapter.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of SHA-256 over names, dtypes, shapes and little-endian values, in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return state.hexdigest()[:16]


def save(adapter: Mapping[str, Tensor], path: Path) -> None:
    """Write ``path`` (safetensors) whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, safetensors({n: t.contiguous() for n, t in adapter.items()}))


def load(path: Path) -> Adapter:
    """The adapter that `save` wrote."""
    return load_file(path)
