"""A batch's loss and gradients in as many pieces as memory wants; the step stays that of the whole batch.

    loss = mean over n images = sum over pieces of n_piece / n * (mean over the piece)

and so is its gradient, which each piece adds to. A batch of which nothing is too large is one piece, and costs nothing more.
"""

from __future__ import annotations

import logging
from typing import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fl.models import Forward

LARGEST: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # images at a time that fit, of models that once did not
SAYS = (  # CUDA, cuBLAS, torch's allocator on a CPU, C++, oneDNN
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "bad_alloc", "could not create a primitive",
)  # fmt: skip
log = logging.getLogger("veilora.learn")


class NoRoom(RuntimeError):
    """Not even one image at a time fits into memory."""


def gradients(model: nn.Module, forward: Forward, images: Tensor, labels: Tensor, clear: Callable[[], object]) -> Tensor:
    """The mean cross-entropy over ``images``, its gradients in the parameters of ``model`` and nothing else in them.

    ``clear`` sets the gradients to zero. When memory runs out, the batch is begun anew in pieces half as large; that size
    stays for the ``model`` as long as this process lives. Raises NoRoom when one image is too many.
    """
    device = next(model.parameters()).device
    while True:
        size = min(len(labels), LARGEST.get(model, len(labels)))
        try:
            clear()
            return _sum(forward, images, labels, size, device)
        except (RuntimeError, MemoryError) as error:  # torch's own is one of the former
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(words in str(error) for words in SAYS):
                raise
            reason = str(error).partition("\n")[0][:100]
        # here, where the error and what its frames held are gone
        _give_back(device)
        if size == 1:
            short = f"training needs memory for one image at a time, and {device} has less{_left(device)}: {reason}"
            raise NoRoom(f"{short}; run fewer workers on it, or a smaller model")
        LARGEST[model] = (size + 1) // 2
        log.warning("%d images at a time are too many for the memory of %s%s: now %d, and the same step", size, device, _left(device), LARGEST[model])


def _sum(forward: Forward, images: Tensor, labels: Tensor, size: int, device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for some, theirs in zip(images.split(size), labels.split(size)):
        loss = cross_entropy(forward(some.to(device)), theirs.to(device)) * (len(theirs) / len(labels))
        loss.backward()
        total += loss.detach()
    return total


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _left(device: torch.device) -> str:
    """What a GPU says of its memory; a CPU's allocator says nothing."""
    if device.type != "cuda":
        return ""
    free, whole = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    return f" ({free:.1f} of {whole:.1f} GiB free)"
