"""A batch in as many pieces as memory wants; a step stays that of the whole batch.

    loss = mean over n images = sum over pieces of n_piece / n * (mean over the piece)

and so is its gradient, which each piece adds to. A batch that fits is one piece, and costs nothing more.
"""

from __future__ import annotations

import logging
from typing import Callable, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fl.models import Forward

Result = TypeVar("Result")
Kind = Literal["train", "evaluate"]
LARGEST: dict[Kind, WeakKeyDictionary[nn.Module, int]] = {"train": WeakKeyDictionary(), "evaluate": WeakKeyDictionary()}
"""How many images at a time fit, of the models with which more once did not; for as long as this process lives."""
SAYS = (  # CUDA, cuBLAS, torch's allocator on a CPU, C++, oneDNN
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "bad_alloc", "could not create a primitive",
)  # fmt: skip
log = logging.getLogger("veilora.learn")


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says what to change."""


def within_memory(kind: Kind, model: nn.Module, most: int, work: Callable[[int], Result]) -> Result:
    """``work(size)``, at first with ``most`` images at a time; begun anew with half as many whenever memory runs out.

    The size stays for the ``kind`` of work with this ``model``. Raises TrainingError when one image is too many.
    """
    device, kept = next(model.parameters()).device, LARGEST[kind]
    while True:
        size = min(most, kept.get(model, most))
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:  # torch's own is one of the former
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(words in str(error) for words in SAYS):
                raise
            reason = str(error).partition("\n")[0][:100]
        # here, where the error and what its frames held are gone
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            short = f"memory is needed for one image at a time, and {device} has less{_left(device)}: {reason}"
            raise TrainingError(f"{short}; run fewer workers on it, or a smaller model")
        kept[model] = (size + 1) // 2
        log.warning("%s: %d images at a time are too many for %s%s; now %d", kind, size, device, _left(device), kept[model])


def gradients(model: nn.Module, forward: Forward, images: Tensor, labels: Tensor, clear: Callable[[], object]) -> Tensor:
    """The mean cross-entropy over ``images``; its gradients, and nothing else, are then in the parameters of ``model``.

    Of C clients, images (C, n, 3, h, w) and labels (C, n), the means are (C,), and a piece is so many images of each.
    ``clear`` sets gradients to zero. Raises TrainingError as `within_memory` does.
    """
    device, n, images_of = next(model.parameters()).device, labels.shape[-1], labels.dim() - 1

    def step(size: int) -> Tensor:
        clear()
        total = torch.zeros(labels.shape[:-1], device=device)
        for some, theirs in zip(images.split(size, images_of), labels.split(size, images_of)):
            loss = _means(forward(some.to(device)), theirs.to(device)) * (theirs.shape[-1] / n)
            loss.sum().backward()
            total += loss.detach()
        return total

    return within_memory("train", model, n, step)


def _means(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the images: (n, classes) -> (), or of each client alone (C, n, classes) -> (C,)."""
    if labels.dim() == 1:
        return cross_entropy(logits, labels)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(-1)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """``images`` on ``device``, moved once; where they are, if they would take more than a quarter of what a GPU has left."""
    if device.type == "cuda" and images.device != device and 4 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return images
    return images.to(device)


def _left(device: torch.device) -> str:
    """What a GPU says of its memory; a CPU's allocator says nothing."""
    if device.type != "cuda":
        return ""
    free, whole = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    return f" ({free:.1f} of {whole:.1f} GiB free)"
