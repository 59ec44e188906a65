"""On a GPU no operation mixes devices, as far as torch's fake tensors can tell, which have a device and no values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clients.augmented import stages
from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.course import ROWS, Prepare
from fl.datasets import Examples
from fl.lean import lean
from fl.lean.rows import augmenting
from fl.lean.table import spread
from fl.learn import fit, plain
from fl.models.lora_patch import lora_patch
from fl.pieces import resident
from fl.randomness import generator
from fl.recipe import Recipe

RECIPE = Recipe(lr={"lora_a": 0.01, "lora_b": 0.01, "head": 0.01, "patch_embed": 0.01}, batch=4)
GPU = torch.device("cuda", 0)


class Enough(Exception):
    """Fake tensors know no backward on a GPU that is not there."""


def empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, device=GPU), parameter.requires_grad)


@pytest.fixture
def room(monkeypatch):
    """Says how much memory the GPU has left."""
    return lambda free: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("step", ["lean", "spread", "plain", "ready"])
def test_a_gpu_has_the_images_once_and_makes_its_batches_there(tiny, key, room, step, side):
    cipher, model, seen = pixel_shuffle(key, 8), tiny(lora_patch(2), image=side), []
    room(10**9)
    makes = {"plain": stages(cipher, 16, 16, side), "ready": ROWS}.get(step, augmenting(cipher, 16, 16, side, 8))

    def batch(images, chosen, stream):
        seen.append(images.device)
        made = makes.batch(images, chosen, stream)
        seen.append(made.device)
        return made

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            module._parameters.update({n: empty(p) for n, p in module._parameters.items() if p is not None})
        forward = lean(model, "bfloat16", "plain") if step in ("lean", "spread") else plain(model)
        images = torch.empty(10, 3, *(2 * [side if step == "ready" else 16]), dtype=torch.uint8)
        examples = Examples(spread(images) if step == "spread" else images, torch.empty(10, dtype=torch.int64))

        def watched(images):
            seen.append(forward(images).device)
            raise Enough

        with pytest.raises(Enough):
            fit(model, examples, RECIPE, generator(0, "fit"), Prepare(batch, makes.anywhere), watched)
    there = GPU if side == 16 or step == "ready" else torch.device("cpu")  # a resize is the CPU's
    assert seen == [there, there, GPU]


def test_images_stay_where_they_are_when_a_gpu_has_no_room_to_spare(room):
    with FakeTensorMode():
        images = torch.empty(10, 3, 16, 16, dtype=torch.uint8)
        for free, device in ((4 * images.nbytes - 1, torch.device("cpu")), (4 * images.nbytes, GPU)):
            room(free)
            assert resident(images, GPU).device == device
            assert resident(images.to(GPU), GPU).device == GPU and resident(images, torch.device("cpu")) is images
