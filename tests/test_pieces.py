"""When memory runs out the step stays the same: pieces of a batch give its gradients, and only their size is remembered."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_learn import RATES, STILL, Linear, awake, dots, slope

from fl.adapter import PATCH_EMBED, read
from fl.lean import lean
from fl.learn import TrainingError, evaluate, fit, plain
from fl.models.lora_patch import lora_patch
from fl.pieces import LARGEST, gradients
from fl.provenance import ROOT
from fl.randomness import generator
from fl.recipe import Recipe

SHORT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), RuntimeError("could not create a primitive"), MemoryError("std::bad_alloc")]
RECIPE = Recipe(lr=RATES, batch=16, epochs=2)


def narrow(forward, room: int, error: RuntimeError = SHORT[0]):
    """``forward`` on a machine with room for so many images; it notes how many it was given each time."""
    given = []

    def tried(images):
        given.append(len(images))
        if len(images) > room:
            raise error
        return forward(images)

    return tried, given


def backward_narrow(forward, room: int, images_of: int = 0):
    """The same, but memory runs out in the backward, when gradients have been written already; ``images_of`` is their dimension."""

    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.n = x.shape[images_of]
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            if ctx.n > room:
                raise SHORT[0]
            return dx

    def tried(images):
        logits = forward(images)
        return Short.apply(logits) + (0 if images.shape[images_of] <= room else logits)

    return tried


def step(forward, model, examples) -> dict[str, torch.Tensor]:
    def clear():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    loss = gradients(model, forward, *examples, clear)
    return {"loss": loss, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("room", [39, 20, 7, 1])
@pytest.mark.parametrize("kind", ["plain", "lean"])
@pytest.mark.parametrize("short", [narrow, backward_narrow], ids=["forward", "backward"])
def test_pieces_give_the_gradients_of_the_whole_batch(tiny, forty, kind, room, short):
    model = awake(tiny(lora_patch))
    forward = lean(model, "float32", "plain") if kind == "lean" else plain(model)
    whole = step(forward, model, forty)
    tried = short(forward, room)
    pieces = step(tried[0] if isinstance(tried, tuple) else tried, model, forty)
    assert whole.keys() == pieces.keys() and PATCH_EMBED in whole and LARGEST["train"][model] <= room
    for name in whole:
        assert float((pieces[name] - whole[name]).norm()) <= 1e-6 * max(1, float(whole[name].norm())), name
        assert whole[name].any()


def test_uneven_pieces_weigh_by_what_they_have():
    """Five pictures in pieces of three and two, against the closed form."""
    model, examples = Linear(), dots(5)
    start = model.head.weight.detach().clone()
    forward, given = narrow(plain(model), 3)
    fitted = fit(model, examples, Recipe(lr={"head": 0.5}, batch=5, **STILL), generator(0, "fit"), forward=forward)
    assert given == [5, 3, 2] and fitted.steps == 1 and fitted.seen == 5
    torch.testing.assert_close(model.head.weight.detach(), start - 0.5 * slope(start, examples))


@pytest.mark.parametrize("error", SHORT)
def test_a_training_with_little_memory_is_the_training_with_enough(tiny, forty, error, caplog):
    rich, poor = (awake(tiny(lora_patch)) for _ in range(2))
    told = fit(rich, forty, RECIPE, generator(0, "fit"))
    forward, given = narrow(plain(poor), 5, error)
    with caplog.at_level(logging.WARNING):
        same = fit(poor, forty, RECIPE, generator(0, "fit"), forward=forward)
    assert given == [16, 8, *[4] * 20] and len(caplog.records) == 2  # 16, 16, 8 images, twice: what did not fit is not tried again
    assert same.steps == told.steps and same.seen == told.seen and same.loss == pytest.approx(told.loss, abs=1e-6)
    for name, tensor in read(rich).items():
        torch.testing.assert_close(read(poor)[name], tensor, rtol=1e-3, atol=2e-4)
    fit(poor, forty, replace(RECIPE, epochs=1), generator(0, "fit"), forward=forward)
    assert given[-10:] == [4] * 10 and len(given) == 32  # nor in the next round


def test_with_enough_memory_nothing_is_cut_and_nothing_said(tiny, forty, caplog):
    model = tiny(lora_patch)
    forward, given = narrow(plain(model), 99)
    fit(model, forty, replace(RECIPE, epochs=1), generator(0, "fit"), forward=forward)
    assert given == [16, 16, 8] and model not in LARGEST["train"] and not caplog.records


def test_no_memory_for_one_image_is_said_in_one_line(tiny, forty):
    model = tiny(lora_patch)
    forward, given = narrow(plain(model), 0)
    with pytest.raises(TrainingError, match="memory is needed for one image at a time, and cpu has less: CUDA out of memory.*; run fewer workers") as caught:
        fit(model, forty, RECIPE, generator(0, "fit"), forward=forward)
    assert given == [16, 8, 4, 2, 1] and "\n" not in str(caught.value)


def test_an_evaluation_with_little_memory_is_the_evaluation(tiny, forty):
    model = awake(tiny(lora_patch))
    forward, given = narrow(plain(model), 12)
    whole, pieces = evaluate(model, forty, batch=32), evaluate(model, forty, forward, batch=32)
    assert pieces == (pytest.approx(whole.loss, rel=1e-6), whole.correct, 40) and given == [32, 16, *[8] * 5]
    assert LARGEST["evaluate"][model] == 8 and model not in LARGEST["train"]


def test_another_error_comes_through(tiny, forty):
    model = tiny(lora_patch)
    forward, given = narrow(plain(model), 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit(model, forty, RECIPE, generator(0, "fit"), forward=forward)
    assert given == [16]


TIGHT = """
import resource, sys, torch
from fl.datasets import Examples
from fl.learn import fit
from fl.models.lora_patch import lora_patch
from fl.models.vit import vit
from fl.pieces import LARGEST
from fl.recipe import Recipe

torch.set_num_threads(1)
model = vit(name="vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=2, image=32, patch=4, classes=3, weights="none")
lora_patch(model, 0)
examples = Examples(torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8), torch.arange(1024) % 3)
recipe = Recipe(lr={"lora_a": 1e-3, "lora_b": 1e-3, "head": 1e-3, "patch_embed": 1e-3, "backbone": 1e-3}, batch=1024)
fit(model, examples.at(torch.arange(8)), recipe, torch.Generator().manual_seed(0))  # what loads late is loaded
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
fitted = fit(model, examples, recipe, torch.Generator().manual_seed(0))
print(fitted.steps, fitted.seen, fitted.loss, LARGEST["train"].get(model, 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LOUD: how much memory a process may take can be set on Linux alone")
def test_a_process_whose_memory_really_ends_trains_on():
    def trained(mebibytes: int) -> list[float]:
        done = subprocess.run([sys.executable, "-c", TIGHT, str(mebibytes)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [float(word) for word in done.stdout.split()]

    rich, poor = trained(16000), trained(300)
    assert rich[:2] == poor[:2] == [1, 1024] and poor[2] == pytest.approx(rich[2], rel=1e-5)
    assert rich[3] == 1024 and 1 <= poor[3] < 1024
