"""A frozen layer whose weight is laid out once is that layer: values, gradients, and the same where the layout is unknown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl.lean import packed
from fl.lean.packed import Frozen, product


def layer(dtype: torch.dtype = torch.float32, inside: int = 24, outside: int = 40) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inside, outside).to(dtype).requires_grad_(False)


def results(frozen, x: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor]:
    """The value, and the gradients of what goes in, under a fixed gradient of what comes out."""
    inputs = [x.clone().requires_grad_()] + ([] if residual is None else [residual.clone().requires_grad_()])
    y = frozen(*inputs)
    torch.manual_seed(3)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 1, 24)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_it_is_the_layer(dtype, close, shape, with_residual):
    torch.manual_seed(2)
    x, own = torch.randn(shape).to(dtype), layer(dtype)
    residual = torch.randn(*shape[:-1], 40).to(dtype) if with_residual else None
    exact = layer(dtype).double()
    expected = results(lambda x, r=0: exact(x) + r, x.double(), None if residual is None else residual.double())
    for found, must in zip(results(Frozen(own), x, residual), expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - must).abs().max() <= close * must.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_torch_has_no_such_layout_the_result_is_the_same_up_to_rounding(dtype, monkeypatch):
    x, residual = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 40).to(dtype)
    known = results(Frozen(layer(dtype)), x, residual)
    monkeypatch.setattr(packed, "KNOWN", ())
    unknown = Frozen(layer(dtype))
    assert not unknown.packed
    for found, must in zip(results(unknown, x, residual), known, strict=True):
        torch.testing.assert_close(found.float(), must.float(), rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(product(x, layer(dtype).weight, None, residual), residual + x @ layer(dtype).weight.T)


def test_on_this_machine_the_layout_is_known():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    assert torch.float32 in packed.KNOWN, "the lean step runs without packed weights: has torch renamed what fl.lean.packed calls?"
    assert Frozen(layer()).packed


def test_a_layer_that_trains_is_asked_as_it_is():
    own = layer().requires_grad_()
    frozen = Frozen(own)
    x = torch.randn(4, 24)
    before = frozen(x)
    with torch.no_grad():
        own.weight.mul_(2)
    assert not frozen.packed
    torch.testing.assert_close(frozen(x), own(x))
    assert not torch.equal(frozen(x), before)


def test_no_gradient_is_formed_for_an_input_that_needs_none(monkeypatch):
    residual = torch.randn(4, 40, requires_grad=True)
    calls = []
    monkeypatch.setattr(packed, "product", lambda *given: calls.append(1) or product(*given))
    Frozen(layer())(torch.randn(4, 24), residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones(4, 40)) and len(calls) == 1  # forward's


def test_a_weight_is_laid_out_once_for_all_that_share_it_and_anew_when_it_has_changed():
    own = layer()
    one, other = Frozen(own), Frozen(own)
    assert one.along is other.along and one.back is other.back
    with torch.no_grad():
        own.weight.mul_(2)
    x = torch.randn(3, 24)
    torch.testing.assert_close(Frozen(own)(x), own(x))
