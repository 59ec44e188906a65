"""The lean step is one graph for torch.compile, which computes what the step computes; it is for a GPU alone."""

from __future__ import annotations

import pytest
import torch
from test_lean import METHODS, awake, gradients

from clients.workbench import workbench
from fl.config import ConfigError, load
from fl.lean import compiled, lean, packed
from fl.lean.stacked import stack


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Torch traces and differentiates the graph as for a GPU, and runs it operation by operation."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(packed, "KNOWN", ())  # a CPU's layouts are none that a graph can hold
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler about itself
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora_patch", "melo", "full"])
def test_the_step_is_one_graph_and_has_the_same_gradients(tiny, forty, without_a_compiler, method, precision):
    model = awake(tiny(METHODS[method]))
    graph, forward = compiled.compiled(model, precision, "plain"), lean(model, precision, "plain")
    for examples in (forty, type(forty)(forty.images[:8], forty.labels[:8])):  # another size of batch is another graph, or a wider one
        torch.testing.assert_close(graph(examples.images), forward(examples.images))
        found, expected = gradients(model, graph, examples), gradients(model, forward, examples)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_so_is_the_step_of_several_clients(tiny, forty, without_a_compiler):
    model = stack(awake(tiny(METHODS["lora_patch"])), 2)
    images = torch.stack([forty.images, forty.images.flip(0)])
    torch.testing.assert_close(compiled.compiled(model, "float32", "plain")(images), lean(model, "float32", "plain")(images))


def test_on_a_cpu_it_is_refused_in_one_line(key):
    config = load("step=compiled device=cpu model.weights=none")
    with pytest.raises(ConfigError, match="step=compiled is for a GPU.*got device=cpu; set step=lean"):
        workbench(config, key, 10)
