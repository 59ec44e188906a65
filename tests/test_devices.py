"""Model on one device, examples on another: training mixes them nowhere, and waits for the device once, at its end.

Without a GPU torch can still follow shapes and devices (FakeTensorMode). It takes everything but the backward to a GPU that
is not there; so the backward is followed on the device ``meta``, for which there is no fused optimiser.
"""

from __future__ import annotations

import pytest
import torch
from conftest import first
from test_lean import RATES

from fl import learn
from fl.course import Course
from fl.datasets import Examples
from fl.lean import lean
from fl.lean.stacked import stack
from fl.learn import evaluate, fit, fit_together, plain
from fl.models.full import full
from fl.models.lora_patch import lora_patch
from fl.models.lora_sb import lora_sb
from fl.models.ravan import ravan
from fl.randomness import generator
from fl.recipe import Recipe

fake = pytest.importorskip("torch._subclasses.fake_tensor")  # torch's own and not promised to stay
RECIPE = Recipe(lr=RATES, batch=8, mu=0.1, clip=1.0)
STEPS = 5
WAYS = [
    (way, precision, attention, method)
    for method in (lora_patch(2), ravan(2, 3), lora_sb(3), full())
    for way in ("stacked", "lean", "plain") if way != "stacked" or method.__qualname__.startswith(("lora_patch", "lora_sb"))
    for precision in ("float32", "bfloat16") if way != "plain" or precision == "float32"  # autocast looks for a real GPU
    for attention in ("plain", "fused")
]  # fmt: skip


def trained(tiny, forty: Examples, device: str, way: str, precision: str, attention: str, method) -> int:
    """How many steps there were until training asked the device for a value: what a fake one does not have."""
    steps, model = 0, tiny(method)
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        model.to(device)
        model = stack(model, 2) if way == "stacked" else model
        forward = (plain if way == "plain" else lean)(model, precision, attention)
        correction = {n: torch.zeros(p.shape[way == "stacked" :]) for n, p in model.named_parameters() if p.requires_grad}

        def counted(images: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += 1
            assert images.device.type == device
            return forward(images)

        with pytest.raises(fake.DataDependentOutputException):
            if way == "stacked":
                fit_together(model, [Course(forty, generator(i), correction=correction) for i in range(2)], RECIPE, counted)
            else:
                fit(model, forty, RECIPE, generator(0), forward=counted, correction=correction)
    return steps


def name(way: tuple) -> str:
    return " ".join((*way[:3], way[3].__qualname__.partition(".")[0]))


@pytest.mark.parametrize("way", first(6, WAYS), ids=name)
def test_forward_and_backward_stay_on_the_models_device(tiny, forty, monkeypatch, way):
    def optimizer(groups, recipe):
        return torch.optim.SGD([{"params": rows, "peak": 0.1} for rows in groups.values()], lr=0.1, foreach=False)

    monkeypatch.setattr(learn, "_optimizer", optimizer)
    assert trained(tiny, forty, "meta", *way) == STEPS


@pytest.mark.parametrize("way", first(6, WAYS), ids=name)
def test_all_but_the_backward_stays_on_a_gpu(tiny, forty, monkeypatch, way):
    leaves = []
    gather = learn._gather

    def gathered(parameters, lead):
        leaves[:] = parameters.values()
        return gather(parameters, lead)

    def backward(loss: torch.Tensor) -> None:
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf, memory_format=torch.contiguous_format) if leaf.grad is None else leaf.grad

    free = iter([2**30, 0])  # room for the images of the first client alone
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 2**30))
    monkeypatch.setattr(learn, "_gather", gathered)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert trained(tiny, forty, "cuda", *way) == STEPS


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_tensor_that_was_left_behind_is_found(tiny, forty, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    model = tiny(lora_patch(2))
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        model.to(device)
        model.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 16), requires_grad=False)
        for forward in (plain(model), lean(model, "float32", "plain")):
            with pytest.raises(RuntimeError, match="device"):
                fit(model, forty, RECIPE, generator(0), forward=forward)


def test_an_evaluation_stays_there_too(tiny, forty):
    model = tiny(lora_patch(2))
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        with pytest.raises(fake.DataDependentOutputException):
            evaluate(model, forty, lean(model, "float32", "fused"))
