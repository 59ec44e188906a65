"""Codecs: what comes out is what went in, to the accuracy and at the bytes that each promises."""

from __future__ import annotations

import json

import pytest
import torch

from fl.adapter import group
from fl.randomness import generator
from fl.wire.flat import WireError, pack, unpack
from fl.wire.float32 import float32
from fl.wire.half import half
from fl.wire.low_rank import low_rank
from fl.wire.quantised import quantised

INT8, INT4 = quantised(8, 256), quantised(4, 64)
SHAPES = ((), (0, 4), (1,), (7,), (255,), (256,), (257,), (5, 3, 4, 4))
ALL = (float32(), half("bfloat16"), half("float16"), INT8, INT4, quantised(4, 3), low_rank(2), low_rank(1, 4, 64))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_come_back_and_zeros_stay_zeros(codec, shape):
    back = codec.decode(codec.encode(drawn(*shape)), shape)
    assert back.shape == shape and back.dtype == torch.float32
    assert not codec.decode(codec.encode(torch.zeros(shape)), shape).any()


@pytest.mark.parametrize("codec", ALL, ids=lambda c: c.name)
def test_bytes_that_do_not_fill_the_shape_are_refused(codec):
    octets = codec.encode(drawn(40, 30))
    for wrong in (octets[:-1], octets[:0]):
        with pytest.raises(WireError, match="needs"):
            codec.decode(wrong, (40, 30))


@pytest.mark.parametrize("codec", [half("bfloat16"), half("float16"), INT8, INT4, low_rank()], ids=lambda c: c.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(codec, bad):
    with pytest.raises(WireError, match="must be finite"):
        codec.encode(torch.tensor([1.0, bad]))
    with pytest.raises(WireError, match="must be finite"):
        codec.encode(torch.full((30, 40), bad))


def test_float16_says_what_it_cannot_hold():
    with pytest.raises(WireError, match="must be finite in float16, got up to 70000; choose codec=float32"):
        half("float16").encode(torch.tensor([7e4]))


@pytest.mark.parametrize("bits, block", [(8, 256), (4, 64), (4, 3)])
def test_an_integer_is_off_by_less_than_a_step_and_right_on_the_average(bits, block):
    codec, x, steps = quantised(bits, block), drawn(997), 2 ** (bits - 1) - 1
    scale = torch.cat([part.abs().max().expand(len(part)) for part in x.split(block)]) / steps * (1 + 2**-7)
    back = lambda stream=None: codec.decode(codec.encode(x, stream), (997,))
    assert ((back() - x).abs() <= scale / 2 + 1e-7).all()
    draws = [back(generator(k, "codec")) for k in range(400)]
    assert all(((d - x).abs() <= scale + 1e-7).all() for d in draws)
    off = (torch.stack(draws).mean(0) - x) / (scale / 2 / 400**0.5)  # in standard errors, at most
    assert off.abs().max() < 4.5 and abs(float(off.mean())) < 0.2
    assert torch.equal(draws[3], back(generator(3, "codec")))


def test_a_block_by_hand():
    """Largest value 14, so that a step of 4 bits is 2: 14, -14, 4, -2, 1 are 7, -7, 2, -1 and a half up."""
    codec = quantised(4, 64)
    octets = codec.encode(torch.tensor([14.0, -14.0, 4.0, -2.0, 1.0]))
    assert octets.tolist() == [0x00, 0x40, 0x97, 0xF2, 0x01]  # 2.0 in bfloat16; 7 and -7, 2 and -1, 1
    assert codec.decode(octets, (5,)).tolist() == [14, -14, 4, -2, 2]


def test_tiny_and_huge_values_keep_their_block():
    x = torch.cat([torch.full((64,), 1e-30), torch.full((64,), 1e30)])
    torch.testing.assert_close(INT4.decode(INT4.encode(x), (128,)), x, rtol=2**-7, atol=0)


@pytest.mark.parametrize("codec, bytes_", [(float32(), 4), (half(), 2), (INT8, 1 + 2 / 256), (INT4, 1 / 2 + 2 / 64)], ids=lambda c: str(c)[:9])
def test_a_value_costs_what_is_said(codec, bytes_):
    assert codec.encode(drawn(745_728)).size == pytest.approx(745_728 * bytes_, rel=1e-4)


def test_low_rank_is_nearly_the_best_of_its_rank_and_all_there_is_where_there_is_no_more():
    codec = low_rank(3)
    x = drawn(40, 3, 2, 5)
    back = codec.decode(codec.encode(x), x.shape)
    u, s, vt = torch.linalg.svd(x.flatten(1), full_matrices=False)
    best = u[:, :3] * s[:3] @ vt[:3]
    assert float((back.flatten(1) - best).norm() / best.norm()) < 0.02  # what eight bits cost
    exact = drawn(40, 3) @ drawn(3, 30, seed=1)
    assert float((codec.decode(codec.encode(exact), (40, 30)) - exact).norm() / exact.norm()) < 0.02
    assert codec.encode(x).size == 3 * (40 + 30) + 2
    assert low_rank(4).encode(drawn(768, 3, 16, 16)).size == 4 * 1536 + 2 * 24
    assert torch.equal(codec.decode(codec.encode(drawn(5)), (5,)), INT8.decode(INT8.encode(drawn(5)), (5,)))  # no matrix: as it is


def test_each_group_has_its_codec():
    adapter = {"a.lora_a.weight": drawn(4, 30), "patch_embed.proj.weight": drawn(30, 3, 4, 4), "head.bias": drawn(10)}
    codecs = {"lora_a": INT8, "patch_embed": low_rank(2, 4, 64), "head": float32()}
    packed = pack(adapter, codecs, generator(0, "codec"))
    back = unpack(packed, codecs)
    assert set(back) == set(adapter) and torch.equal(back["head.bias"], adapter["head.bias"])
    for name, _, size in json.loads(packed.header):
        assert back[name].shape == adapter[name].shape and codecs[group(name)].encode(adapter[name]).size == size
    with pytest.raises(WireError, match="a codec for the group of patch_embed.proj.weight, got codecs for lora_a"):
        pack(adapter, {"lora_a": INT8})
