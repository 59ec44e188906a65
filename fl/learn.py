"""The only training loop, and the only evaluation loop."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from fl.adapter import group
from fl.datasets import Examples
from fl.recipe import Recipe

Prepare = Callable[[Tensor, Generator], Tensor]
"""uint8 images of one batch -> uint8 images as the model reads them: augmented, resized, encrypted."""


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says what to change."""


class Fitted(NamedTuple):
    """What a round of training was like: steps taken, mean loss over the steps, examples seen."""

    steps: int
    loss: float
    seen: int


class Score(NamedTuple):
    """An evaluation as sums, which add up exactly over clients: summed loss, correct answers, examples."""

    loss: float
    correct: int
    examples: int


def fit(
    model: nn.Module, examples: Examples, recipe: Recipe, stream: Generator, prepare: Prepare | None = None, precision: str = "float32"
) -> Fitted:
    """Train the parameters of ``model`` that require a gradient, in place, as ``recipe`` says.

    ``stream`` decides the order of the examples and what ``prepare`` draws. Raises TrainingError for a loss that is not
    finite, and for fewer than two examples: a one-image step can give the image away, so none is ever taken.
    """
    if len(examples.labels) < 2:
        raise TrainingError(f"training needs at least 2 images, got {len(examples.labels)}; give this client more")
    device = next(model.parameters()).device
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()} if recipe.mu else {}
    optimizer = _optimizer(trained, recipe)
    total = recipe.epochs * _steps(len(examples.labels), recipe.batch)
    model.train()
    losses, seen = torch.zeros((), device=device), 0
    for step, chosen in enumerate(_batches(len(examples.labels), recipe, stream)):
        images, labels = examples.at(chosen)
        images = prepare(images, stream) if prepare else images
        for part in optimizer.param_groups:
            part["lr"] = part["peak"] * schedule(recipe, step / total)
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, precision):
            logits = model(normalise(_to(images, device)))
        loss = cross_entropy(logits.float(), labels.to(device))
        loss.backward()
        if recipe.mu:
            for name, parameter in trained.items():
                parameter.grad.add_(parameter.detach() - start[name], alpha=recipe.mu)
        if recipe.clip:
            nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        optimizer.step()
        losses += loss.detach()
        seen += len(chosen)
    mean = float(losses) / total
    if not math.isfinite(mean):
        raise TrainingError(f"the training loss must stay finite, got {mean}; lower recipe.lr or set recipe.clip=1")
    return Fitted(total, mean, seen)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, precision: str = "float32", batch: int = 250) -> Score:
    """Cross-entropy and accuracy of ``model`` on images that are ready to be read, as sums."""
    device = next(model.parameters()).device
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in zip(examples.images.split(batch), examples.labels.to(device).split(batch)):
        with _autocast(device, precision):
            logits = model(normalise(_to(images, device)))
        loss += float(cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
    return Score(loss, correct, len(examples.labels))


def schedule(recipe: Recipe, progress: float) -> float:
    """The share of the peak learning rate at ``progress`` in [0, 1) of this round: warm-up, then cosine, over the run."""
    low, high = recipe.span
    t = low + (high - low) * progress
    if t < recipe.warmup:
        return min(1.0, max(t, 1e-3) / recipe.warmup)  # never quite zero, so that the first step is one
    return (1 + math.cos(math.pi * (t - recipe.warmup) / (1 - recipe.warmup))) / 2 if recipe.cosine else 1.0


def normalise(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: ``(x / 255 - 0.5) / 0.5``, all channels alike, so that it commutes with the ciphers."""
    return x.float() / 127.5 - 1.0


def _steps(n: int, batch: int) -> int:
    return n // batch + (n % batch > 1) if n >= batch else 1


def _batches(n: int, recipe: Recipe, stream: Generator) -> Iterator[Tensor]:
    """Index batches, reshuffled every epoch; a last batch of one image joins the batch before it."""
    for _ in range(recipe.epochs):
        parts = list(torch.randperm(n, generator=stream).split(recipe.batch))
        if len(parts[-1]) == 1 and len(parts) > 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def _optimizer(trained: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    missing = sorted({group(n) for n in trained} - set(recipe.lr))
    if missing:
        raise TrainingError(f"recipe.lr must have a rate for each group that trains, got none for {', '.join(missing)}")
    by_group: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        by_group.setdefault(group(name), []).append(parameter)
    parts = [{"params": parameters, "peak": recipe.lr[g], "lr": recipe.lr[g]} for g, parameters in by_group.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parts, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parts, weight_decay=recipe.weight_decay)


def _autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _to(images: Tensor, device: torch.device) -> Tensor:
    """On a GPU: channels last, as its convolutions like them."""
    if device.type == "cpu":
        return images
    return images.to(device).contiguous(memory_format=torch.channels_last)
