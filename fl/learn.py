"""The only training loop, for one client or for several at once, and the only evaluation loop."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Iterable, NamedTuple, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from fl.adapter import GROUPS, Adapter, check_like, flat, group
from fl.course import ROWS, Course, Prepare, steps_of
from fl.datasets import Examples
from fl.flat import Flat
from fl.models import Forward
from fl.pieces import TrainingError, gradients, within_memory
from fl.recipe import Recipe, schedule


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

    ``forward`` computes the model's logits, by default as the model itself does; the others are what a `Course` is of. A
    batch too large for memory is taken in pieces (`fl.pieces`). Raises TrainingError for a loss that is not finite, when one
    image is too large, and for fewer than two examples: a one-image step can give the image away, so none is ever taken.
    """
    course = Course(examples, stream, prepare, correction)
    return _train(model, [course], course.batches(recipe, _device(model)), recipe, forward or plain(model))[0]


def fit_together(model: nn.Module, courses: Sequence[Course], recipe: Recipe, forward: Forward) -> list[Fitted]:
    """Train C clients at once, each as `fit` would alone: a ``model`` whose trained parameters are (C, ...), as `fl.lean.stacked`.

    ``forward`` takes images (C, n, 3, h, w) to logits (C, n, classes). Raises TrainingError as `fit` does, and where not all
    have as many examples: then their steps differ.
    """
    sizes = sorted({len(course.examples.labels) for course in courses})
    if len(sizes) != 1:
        raise TrainingError(f"clients that train together must have as many images each, got {sizes}; train them one by one")
    device = _device(model)
    batches = zip(*(course.batches(recipe, device) for course in courses), strict=True)  # some clients' images may be on it already
    steps = (Examples(*(torch.stack([t.to(device) for t in part]) for part in zip(*step))) for step in batches)
    return _train(model, courses, steps, recipe, forward, lead=1)


def _train(
    model: nn.Module, courses: Sequence[Course], batches: Iterable[Examples], recipe: Recipe, forward: Forward, lead: int = 0
) -> list[Fitted]:
    """The loop; of clients that train together each batch, parameter and loss has a ``lead``-ing dimension C."""
    n = len(courses[0].examples.labels)
    if n < 2:
        raise TrainingError(f"training needs at least 2 images, got {n}; give this client more")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError(f"something must train, but the method has none of recipe.groups={list(recipe.groups)}; choose others")
    values, grads, groups = _gather(trained, lead)
    shift = _laid([course.correction for course in courses], grads)
    raw = None if shift is None else torch.zeros_like(grads.buffer)
    start = values.buffer.clone() if recipe.mu else None
    optimizer = _optimizer(groups, recipe)
    total = recipe.epochs * steps_of(n, recipe.batch)
    model.train()
    losses, seen, taken, began = torch.zeros(grads.buffer.shape[:-1], device=grads.buffer.device), 0, 0, time.monotonic()
    for step, (images, labels) in enumerate(batches):
        for part in optimizer.param_groups:
            part["lr"] = part["peak"] * schedule(recipe, step / total)
        loss = gradients(model, forward, images, labels, model.zero_grad if lead else grads.buffer.zero_)
        if lead:  # torch wants a gradient (C, ...) in one piece, so it comes into its rows afterwards
            torch.cat([trained[n].grad.flatten(1) for n in grads], dim=1, out=grads.buffer)
        if shift is not None:
            raw.add_(grads.buffer)
            grads.buffer.add_(shift)
        if start is not None:
            grads.buffer.add_(values.buffer - start, alpha=recipe.mu)
        if recipe.clip:
            grads.buffer.mul_((recipe.clip / (grads.buffer.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0))
        optimizer.step()
        losses += loss
        seen, taken = seen + labels.shape[-1], step + 1
        if recipe.deadline and time.monotonic() - began > recipe.deadline:
            break  # before the next step, whatever it would take: the updates of slow machines are worth having
    means = [loss / taken for loss in losses.view(-1).tolist()]
    if not all(map(math.isfinite, means)):
        raise TrainingError(f"the training loss must stay finite, got {max(means)}; lower recipe.lr or set recipe.clip=1")
    slopes = [None] * len(means) if raw is None else [Flat(row, grads.layout) for row in (raw / taken).cpu().view(len(means), -1)]
    return [Fitted(taken, mean, seen, slope) for mean, slope in zip(means, slopes)]


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, forward: Forward | None = None, batch: int = 250) -> Score:
    """Cross-entropy and accuracy of ``model`` on images that are ready to be read, as sums; ``forward`` as in `fit`."""
    device, forward = _device(model), forward or plain(model)
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


def normalise(x: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 -> float32 in [-1, 1]: ``(x / 255 - 0.5) / 0.5`` to rounding, all channels alike: so it commutes with the ciphers."""
    values = x.to(torch.float32, copy=True) if out is None else out.copy_(x)
    return values.mul_(1 / 127.5).sub_(1.0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _gather(parameters: dict[str, nn.Parameter], lead: int) -> tuple[Flat, Flat, dict[str, list[nn.Parameter]]]:
    """Move the parameters and their gradients into two buffers, of which they become views; of C clients, the parameters alone.

    Returns both buffers and, for the optimiser, each group as one parameter with its gradient, or as one of each client.
    """
    values = flat(parameters, lead)
    grads = Flat(torch.zeros_like(values.buffer), values.layout)
    groups, end = {}, 0
    for name in values:
        parameters[name].data, parameters[name].grad = values[name], None if lead else grads[name]
    for name in GROUPS:
        start, end = end, end + sum(math.prod(shape) for n, shape in values.layout if group(n) == name)
        if end > start:
            groups[name] = [nn.Parameter(row) for row in values.buffer[..., start:end].view(-1, end - start)]
            for row, slope in zip(groups[name], grads.buffer[..., start:end].view(-1, end - start)):
                row.grad = slope
    return values, grads, groups


def _laid(corrections: Sequence[Adapter | None], grads: Flat) -> Tensor | None:
    """The corrections as the gradients lie in their buffer, zero where there is none; None where nobody has one."""
    if corrections[0] is None:
        return None
    laid = torch.zeros_like(grads.buffer)
    for row, correction in zip(laid.view(len(corrections), -1), corrections, strict=True):
        own = Flat(row, grads.layout)
        check_like(correction, {n: own[n] for n in correction if n in own})
        for name, tensor in correction.items():
            own[name].copy_(tensor)
    return laid


def _optimizer(groups: dict[str, list[nn.Parameter]], recipe: Recipe) -> torch.optim.Optimizer:
    missing = sorted(set(groups) - set(recipe.lr))
    if missing:
        raise TrainingError(f"recipe.lr must have a rate for each group that trains, got none for {', '.join(missing)}")
    parts = [{"params": values, "peak": recipe.lr[g], "lr": recipe.lr[g]} for g, values in groups.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parts, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.AdamW(parts, weight_decay=recipe.weight_decay, fused=True)
