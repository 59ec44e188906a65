"""The only training loop, and the only evaluation loop."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from fl.adapter import GROUPS, Adapter, check_like, flat, group
from fl.datasets import Examples
from fl.flat import Flat
from fl.models import Forward
from fl.pieces import TrainingError, gradients, resident, within_memory
from fl.recipe import Recipe


class Prepare(NamedTuple):
    """How the images of a batch become what the model reads: augmented, resized, encrypted.

    ``batch`` takes all images (uint8), which of them (int64, on the CPU), and chance. Unless it works ``anywhere``, with what
    comes out where the images are, these stay on the CPU.
    """

    batch: Callable[[Tensor, Tensor, Generator], Tensor]
    anywhere: bool = True


ROWS = Prepare(lambda images, chosen, stream: images.index_select(0, chosen.to(images.device)))
"""The images as they are."""


class Fitted(NamedTuple):
    """What a round of training was like: steps taken, mean loss over the steps, examples seen.

    Under ``correction`` also the mean over the steps of the loss's own gradient, without it, on the CPU.
    """

    steps: int
    loss: float
    seen: int
    gradient: Adapter | None = None


class Score(NamedTuple):
    """An evaluation as sums, which add up exactly over clients: summed loss, correct answers, examples."""

    loss: float
    correct: int
    examples: int


def fit(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    stream: Generator,
    prepare: Prepare = ROWS,
    forward: Forward | None = None,
    correction: Adapter | None = None,
) -> Fitted:
    """Train the parameters of ``model`` that require a gradient, in place, as ``recipe`` says.

    ``forward`` computes the model's logits, by default as the model itself does. ``stream`` decides the order of the
    examples and what ``prepare`` draws. A GPU gets the images once, where ``prepare`` works there and they leave it room.
    ``correction`` is added to the gradient of each step, before it is clipped. A batch too large for memory is taken in pieces
    (`fl.pieces`). Raises TrainingError for a loss that is not finite, when one image is too large, and for fewer than two
    examples: a one-image step can give the image away, so none is ever taken.
    """
    if len(examples.labels) < 2:
        raise TrainingError(f"training needs at least 2 images, got {len(examples.labels)}; give this client more")
    device = next(model.parameters()).device
    forward = forward or plain(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError(f"something must train, but the method has none of recipe.groups={list(recipe.groups)}; choose others")
    grads, groups = _gather(trained)
    shift = None if correction is None else _laid(correction, grads)
    raw = None if correction is None else torch.zeros_like(grads.buffer)
    start = {g: p.detach().clone() for g, p in groups.items()} if recipe.mu else {}
    optimizer = _optimizer(groups, recipe)
    total = recipe.epochs * _steps(len(examples.labels), recipe.batch)
    model.train()
    losses, seen, taken, began = torch.zeros((), device=device), 0, 0, time.monotonic()
    source = resident(examples.images, device) if prepare.anywhere else examples.images
    for step, chosen in enumerate(_batches(len(examples.labels), recipe, stream)):
        images, labels = prepare.batch(source, chosen, stream), examples.labels[chosen]
        for part in optimizer.param_groups:
            part["lr"] = part["peak"] * schedule(recipe, step / total)
        loss = gradients(model, forward, images, labels, grads.buffer.zero_)
        if shift is not None:
            raw.add_(grads.buffer)
            grads.buffer.add_(shift)
        for name in start:
            groups[name].grad.add_(groups[name].detach() - start[name], alpha=recipe.mu)
        if recipe.clip:
            grads.buffer.mul_((recipe.clip / (grads.buffer.norm() + 1e-6)).clamp(max=1.0))
        optimizer.step()
        losses += loss
        seen, taken = seen + len(chosen), step + 1
        if recipe.deadline and time.monotonic() - began > recipe.deadline:
            break  # before the next step, whatever it would take: the updates of slow machines are worth having
    mean = float(losses) / taken
    if not math.isfinite(mean):
        raise TrainingError(f"the training loss must stay finite, got {mean}; lower recipe.lr or set recipe.clip=1")
    return Fitted(taken, mean, seen, None if raw is None else Flat((raw / taken).cpu(), grads.layout))


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, forward: Forward | None = None, batch: int = 250) -> Score:
    """Cross-entropy and accuracy of ``model`` on images that are ready to be read, as sums; ``forward`` as in `fit`."""
    device = next(model.parameters()).device
    forward = forward or plain(model)
    model.eval()

    def score(size: int) -> Score:
        loss, correct = 0.0, 0
        for images, labels in zip(examples.images.split(size), examples.labels.to(device).split(size)):
            logits = forward(images.to(device))
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(-1) == labels).sum())
        return Score(loss, correct, len(examples.labels))

    return within_memory("evaluate", model, batch, score)


def plain(model: nn.Module, precision: str = "float32", attention: str = "fused") -> Forward:
    """``model`` as it computes itself, in float32 or under torch's autocast to bfloat16: the oracle of `fl.lean`."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's own switch
            module.fused_attn = attention == "fused"

    def forward(images: Tensor) -> Tensor:
        if images.device.type != "cpu":
            images = images.contiguous(memory_format=torch.channels_last)  # as a GPU's convolutions like them
        with torch.autocast(images.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
            return model(normalise(images)).float()

    return forward


def schedule(recipe: Recipe, progress: float) -> float:
    """The share of the peak learning rate at ``progress`` in [0, 1) of this round: warm-up, then cosine, over the run."""
    low, high = recipe.span
    t = low + (high - low) * progress
    if t < recipe.warmup:
        return min(1.0, max(t, 1e-3) / recipe.warmup)  # never quite zero, so that the first step is one
    return (1 + math.cos(math.pi * (t - recipe.warmup) / (1 - recipe.warmup))) / 2 if recipe.cosine else 1.0


def normalise(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: ``(x / 255 - 0.5) / 0.5``, all channels alike, so that it commutes with the ciphers."""
    return x.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def _steps(n: int, batch: int) -> int:
    return n // batch + (n % batch > 1) if n >= batch else 1


def _batches(n: int, recipe: Recipe, stream: Generator) -> Iterator[Tensor]:
    """Index batches, reshuffled every epoch; a last batch of one image joins the batch before it."""
    for _ in range(recipe.epochs):
        parts = list(torch.randperm(n, generator=stream).split(recipe.batch))
        if len(parts[-1]) == 1 and len(parts) > 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def _gather(parameters: dict[str, nn.Parameter]) -> tuple[Flat, dict[str, nn.Parameter]]:
    """Move the parameters and their gradients into two buffers, of which they become views.

    Returns the gradients and, for the optimiser, each group as one parameter with its gradient: a step is a call a group.
    """
    values = flat(parameters)
    grads = Flat(torch.zeros_like(values.buffer), values.layout)
    groups, end = {}, 0
    for name in values:
        parameters[name].data, parameters[name].grad = values[name], grads[name]
    for name in GROUPS:
        start, end = end, end + sum(p.numel() for n, p in parameters.items() if group(n) == name)
        if end > start:
            groups[name] = nn.Parameter(values.buffer[start:end])
            groups[name].grad = grads.buffer[start:end]
    return grads, groups


def _laid(correction: Adapter, grads: Flat) -> Tensor:
    """The correction as the gradients lie in their buffer, zero where there is none."""
    laid = Flat(torch.zeros_like(grads.buffer), grads.layout)
    check_like(correction, {n: grads[n] for n in correction if n in grads})
    for name, tensor in correction.items():
        laid[name].copy_(tensor)
    return laid.buffer


def _optimizer(groups: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    missing = sorted(set(groups) - set(recipe.lr))
    if missing:
        raise TrainingError(f"recipe.lr must have a rate for each group that trains, got none for {', '.join(missing)}")
    parts = [{"params": [values], "peak": recipe.lr[g], "lr": recipe.lr[g]} for g, values in groups.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parts, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.AdamW(parts, weight_decay=recipe.weight_decay, fused=True)
