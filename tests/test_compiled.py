"""The lean step is one graph for torch.compile, which computes what the step computes; it is for a GPU alone."""

from __future__ import annotations

import pytest
import torch
from test_lean import METHODS, awake, gradients

from clients.workbench import workbench
from fl.config import ConfigError, load
from fl.datasets import Examples
from fl.lean import lean, packed
from fl.lean.blocks import blocks
from fl.lean.compiled import compiled
from fl.lean.stacked import stack
from fl.models.lora_patch import lora_patch


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Torch traces and differentiates the graph as for a GPU; a CPU's layouts are none that a graph can hold."""
    monkeypatch.setattr(packed, "KNOWN", ())
    torch.compiler.reset()


def one_graph(forward):
    """``forward`` run operation by operation, but as one graph: whatever would break it raises."""
    return torch.compile(forward, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler about itself
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora_patch", "melo", "full"])
def test_the_step_is_one_graph_and_has_the_same_gradients(tiny, forty, as_on_a_gpu, method, precision):
    model = awake(tiny(METHODS[method]))
    forward = lean(model, precision, "plain")
    graph, few = one_graph(forward), Examples(forty.images[:8], forty.labels[:8])
    for examples in (forty, few, forty._replace(images=blocks(forty.images, 8))):  # other sizes and, from a gather, blocks
        torch.testing.assert_close(graph(examples.images), forward(examples.images))
        found, expected = gradients(model, graph, examples), gradients(model, forward, examples)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
        with torch.no_grad():  # an evaluation comes in pictures, after a round in blocks
            torch.testing.assert_close(graph(few.images), forward(few.images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_so_is_the_step_of_several_clients(tiny, forty, as_on_a_gpu):
    model = stack(awake(tiny(METHODS["lora_patch"])), 2)
    images = torch.stack([forty.images, forty.images.flip(0)])
    forward = lean(model, "float32", "plain")
    torch.testing.assert_close(one_graph(forward)(images), forward(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_beyond_torchs_limit_it_goes_on_as_it_is(tiny, forty, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for rank in (1, 2, 3, 4):
        model = awake(tiny(lora_patch(rank)))
        graph, forward = compiled(model, "float32", "plain", "aot_eager"), lean(model, "float32", "plain")
        for images in (forty.images, forty.images[:9], blocks(forty.images, 8)):
            torch.testing.assert_close(graph(images), forward(images))


def test_on_a_cpu_it_is_refused_in_one_line(key):
    config = load("step=compiled device=cpu model.weights=none")
    with pytest.raises(ConfigError, match="step=compiled is for a GPU.*got device=cpu; set step=lean"):
        workbench(config, key, 10)
