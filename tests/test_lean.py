"""The lean step computes what the timm model computes: logits, gradients, training; and `auto` is decided once."""

from __future__ import annotations

import json
import platform
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.functional import linear as linear_map

from fl.adapter import group, norm, only, read, sub, write
from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.ciphers.plain import plain as plain_cipher
from fl.datasets.images import augment, resize
from fl.lean import blocks as blocks_of
from fl.lean import choose as choosing
from fl.lean import lean
from fl.lean.attention import ATTENTIONS, one_query, softmax
from fl.lean.blocks import blocks, embedded, levels
from fl.lean.choose import choose
from fl.lean.heap import keep_freed_memory
from fl.lean.merged import MergedQKV
from fl.lean.rows import augmenting
from fl.lean.table import spread
from fl.learn import evaluate, fit, normalise, plain
from fl.models import WeightsError
from fl.models.full import full
from fl.models.linear import linear
from fl.models.lora import take_rank
from fl.models.lora_patch import lora_patch
from fl.models.lora_sb import lora_sb
from fl.models.melo import melo
from fl.models.ravan import ravan
from fl.randomness import generator
from fl.recipe import Recipe
from strategies.factors import at_rank

METHODS = {"lora_sb": lora_sb(3), "ravan": ravan(2, 3), "lora_patch": lora_patch(2), "melo": melo(2), "full": full(), "linear": linear()}
RATES = {"lora_a": 1e-2, "lora_b": 1e-2, "lora_r": 1e-2, "head": 1e-2, "patch_embed": 1e-3, "backbone": 1e-3}


def awake(model):
    """Move what starts at zero, so that every path carries something."""
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=stream)
    return model


def gradients(model, forward, examples) -> dict[str, torch.Tensor]:
    model.zero_grad()
    cross_entropy(forward(examples.images), examples.labels).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "attention"), list(product(METHODS, ATTENTIONS)))
def test_logits_and_gradients_are_the_plain_step_s(tiny, forty, method, attention):
    model = awake(tiny(METHODS[method]))
    forward = lean(model, "float32", attention)
    torch.testing.assert_close(forward(forty.images), plain(model)(forty.images), rtol=1e-5, atol=1e-5)
    expected, found = gradients(model, plain(model), forty), gradients(model, forward, forty)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert norm({name: found[name] - gradient}) <= 1e-5 * norm({name: gradient}), name


@pytest.mark.parametrize(("method", "groups"), [("lora_sb", ("lora_r", "head")), ("lora_patch", ("lora_b",)), ("lora_patch", ("lora_a",))])
def test_where_some_factors_are_frozen_the_others_have_the_plain_step_s_gradients(tiny, forty, method, groups):
    model = awake(tiny(METHODS[method]))
    forward = lean(model, "float32", "plain")
    with only(model, groups):
        expected, found = gradients(model, plain(model), forty), gradients(model, forward, forty)
    assert {group(n) for n in found} == set(groups)
    for name, gradient in expected.items():
        assert norm({name: found[name] - gradient}) <= 1e-5 * norm({name: gradient}), name


def test_the_merged_weight_follows_the_factors(tiny, forty):
    model = awake(tiny(lora_patch(2)))
    forward, before = lean(model, "float32", "plain"), None
    for _ in range(2):
        torch.testing.assert_close(forward(forty.images), plain(model)(forty.images), rtol=1e-5, atol=1e-5)
        assert before is None or not torch.equal(before, forward(forty.images))
        before = forward(forty.images).detach()
        with torch.no_grad():
            model.get_parameter("blocks.1.attn.qkv.v.lora_b.weight").add_(1)


@pytest.mark.parametrize("step", ["plain", "lean"])
def test_a_model_that_takes_one_rank_after_another_trains_as_a_fresh_one_of_each(tiny, forty, step):
    """The scale is the run's, so that a fresh model of rank r has alpha = 2 r in the place of 2 * 4."""
    forwards = {"plain": plain, "lean": lambda model: lean(model, "float32", "plain")}
    shared = tiny(lora_patch(4, 8.0))
    forward, whole = forwards[step](shared), read(shared)
    for rank in (2, 4, 1, 3, 4):
        given = at_rank(whole, rank)
        take_rank(shared, given)
        write(shared, given)
        fresh = tiny(lora_patch(rank, 2.0 * rank))
        write(fresh, given)
        for model, function in ((shared, forward), (fresh, forwards[step](fresh))):
            fit(model, forty, Recipe(lr=RATES, batch=8), generator(0, "fit"), forward=function)
        assert all(torch.equal(a, read(fresh)[n]) for n, a in read(shared).items()) and read(shared).keys() == read(fresh).keys()
        assert evaluate(shared, forty, forward) == evaluate(fresh, forty, forwards[step](fresh))
        assert len(read(shared)["blocks.0.attn.qkv.q.lora_a.weight"]) == rank


def test_frozen_weights_stay_as_they_are(tiny, forty):
    model = awake(tiny(melo(2)))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    fit(model, forty, Recipe(lr=RATES, batch=8), generator(0, "fit"), forward=lean(model, "float32", "plain"))
    assert all(torch.equal(model.get_parameter(n), t) for n, t in frozen.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_lean_is_training_plain(tiny, forty, optimizer):
    recipe = Recipe(lr=dict.fromkeys(RATES, 0.05) if optimizer == "sgd" else RATES, optimizer=optimizer, batch=8, epochs=2)
    one, other = (tiny(lora_patch(2)) for _ in range(2))
    start, forward = read(one), lean(one, "float32", "plain")
    fit(one, forty, recipe, generator(0, "fit"), forward=forward)
    fit(other, forty, recipe, generator(0, "fit"))
    moved = norm(sub(read(other), start))
    assert norm(sub(read(one), read(other))) < (1e-5 if optimizer == "sgd" else 1e-3) * moved
    assert evaluate(one, forty, forward).loss == pytest.approx(evaluate(other, forty).loss, rel=1e-4)


def test_in_bfloat16_the_frozen_base_is_stored_once_and_what_trains_stays_float32(tiny, forty):
    model, oracle = awake(tiny(lora_patch(2))), awake(tiny(lora_patch(2)))
    forward = lean(model, "bfloat16", "plain")
    for name, parameter in model.named_parameters():
        wide = parameter.requires_grad or name.endswith("qkv.weight")  # LoRA's master
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    found, expected = gradients(model, forward, forty), gradients(oracle, plain(oracle), forty)
    for name in expected:
        a, b = found[name].flatten().double(), expected[name].flatten().double()
        assert float(a @ b / (a.norm() * b.norm())) > 0.99, name


def test_a_small_lora_product_is_not_rounded_away_in_bfloat16(tiny, forty):
    """A product of a thousandth of W keeps its size only when it is added in float32."""
    model = tiny(melo(2))
    layer = model.blocks[0].attn.qkv
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
        for part in (layer.q, layer.v):
            part.lora_a.weight.normal_(generator=torch.Generator().manual_seed(1))
            part.lora_b.weight.normal_(generator=torch.Generator().manual_seed(2))
            part.lora_b.weight.mul_(1e-3 / part.scale)
    wide = layer.weight[:16] + layer.q.scale * layer.q.lora_b.weight @ layer.q.lora_a.weight
    merged = MergedQKV(layer, torch.bfloat16, scale=0.5)
    merged.all(torch.zeros(1, 16, dtype=torch.bfloat16))
    change = (merged.merged[:16].float() / 0.5 - layer.weight[:16]).detach().flatten()
    meant = (wide - layer.weight[:16]).detach().flatten()
    assert float(change @ meant / meant.square().sum()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_attention_is_torch_s(name, tokens):
    stream = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, tokens, 24, generator=stream, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, tokens, 8, generator=stream, dtype=torch.float64)
    q, k, v = qkv.view(3, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, tokens, 8)
    scaled = torch.cat([qkv[..., :8] / 2, qkv[..., 8:]], dim=-1)
    found = ATTENTIONS[name](scaled, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), qkv)[0] for y in (found, expected)))
    alone = one_query(scaled[:, 0, :8], scaled[:, :, 8:], 2)
    torch.testing.assert_close(alone, expected[:, 0])


@pytest.mark.parametrize("tokens", [3, 65, 197])
def test_softmax_in_bfloat16_is_that_of_wide_numbers_to_a_rounding(tokens):
    scores = 4 * torch.randn(6, tokens, tokens, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = softmax(scores)
    assert found.dtype == torch.bfloat16 and found.is_contiguous() and found.layout == torch.strided
    torch.testing.assert_close(found.double(), scores.double().softmax(-1), rtol=2**-8, atol=1e-6)


def test_a_model_with_other_parts_is_refused_with_the_way_out(tiny):
    for change in ({"init_values": 1e-5}, {"qk_norm": True}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"scale_attn_norm": True}, {"final_norm": False}):
        with pytest.raises(WeightsError, match="step=plain"):
            lean(tiny(lora_patch(2), **change), "float32", "plain")


def test_auto_is_measured_once_and_kept(tiny, tmp_path, monkeypatch):
    model, asked = tiny(lora_patch(2)), []

    def measured(candidates, *shape):
        asked.append(candidates)
        return {c: {"float32": 1.0, "bfloat16": 0.5}[c[0]] for c in candidates}

    monkeypatch.setattr(choosing, "measure", measured)
    cpu = torch.device("cpu")
    assert choose("float32", "plain", model, cpu, tmp_path) == ("float32", "plain") and not asked
    assert choose("auto", "auto", model, cpu, tmp_path) == ("bfloat16", "fused")
    assert choose("auto", "auto", model, cpu, tmp_path) == ("bfloat16", "fused") and len(asked) == 1
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({"answer": ["float32", "plain"]}))  # what another process was first to find out
    assert choose("auto", "auto", model, cpu, tmp_path) == ("float32", "plain")


@pytest.mark.parametrize("text", ["", "{}", '{"answer": ["float16", "magic"]}', '{"answer": 3}'])
def test_a_damaged_answer_is_asked_anew(tiny, tmp_path, monkeypatch, text):
    monkeypatch.setattr(choosing, "measure", lambda candidates, *shape: dict.fromkeys(candidates, 1.0))
    ask = lambda: choose("auto", "auto", tiny(lora_patch(2)), torch.device("cpu"), tmp_path)
    assert ask() == ("float32", "fused")
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert ask() == ("float32", "fused") and json.loads(path.read_text())["answer"] == ["float32", "fused"]


def test_an_answer_that_cannot_be_kept_is_still_one(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(choosing, "measure", lambda candidates, *shape: asked.append(1) or dict.fromkeys(candidates, 1.0))
    (tmp_path / "file").touch()
    for _ in range(2):
        assert choose("auto", "auto", tiny(lora_patch(2)), torch.device("cpu"), tmp_path / "file") == ("float32", "fused")
    assert len(asked) == 1


def test_what_is_hardly_faster_is_not_chosen(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "measure", lambda candidates, *shape: dict(zip(candidates, (1.0, 0.95, 0.9, 0.9))))
    assert choose("auto", "auto", tiny(lora_patch(2)), torch.device("cpu"), tmp_path) == ("float32", "fused")


def test_the_measurement_takes_every_candidate(tiny):
    candidates = list(product(("float32", "bfloat16"), ATTENTIONS))
    seconds = choosing.measure(candidates, 5, 16, 2, torch.device("cpu"), repeats=1)
    assert list(seconds) == candidates and all(t > 0 for t in seconds.values())


@pytest.mark.parametrize(("cipher", "side"), [(pixel_shuffle, 16), (pixel_shuffle, 32), (plain_cipher, 24)])
def test_one_gather_is_augment_and_then_encrypt_bit_for_bit(cipher, side, key):
    cipher = cipher(key, 8)
    images = torch.randint(0, 256, (200, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    once, apart = (generator(0, "augment") for _ in range(2))
    prepare = augmenting(cipher, side, side, side, 8)
    for chosen, source in zip(torch.randperm(200).split(64), 2 * (images, spread(images))):
        expected = cipher.encrypt(augment(images[chosen], apart))
        assert torch.equal(prepare.batch(source, chosen, once), blocks(expected, 8))


@pytest.mark.parametrize(("size", "side", "p"), [((32, 32), 224, 16), ((32, 24), 48, 8), ((40, 48), 24, 8), ((16, 48), 48, 16), ((48, 30), 48, 8)])
@pytest.mark.parametrize("cipher", [pixel_shuffle, plain_cipher])
def test_a_resize_in_two_passes_with_the_cipher_in_runs_is_augment_resize_and_encrypt_bit_for_bit(cipher, size, side, p, key):
    cipher = cipher(key, p)
    images = torch.randint(0, 256, (9, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    once, apart = (generator(0, "augment") for _ in range(2))
    prepare = augmenting(cipher, *size, side, p)
    for chosen, source in zip(torch.randperm(9).split(5), (images, spread(images))):
        expected = cipher.encrypt(resize(augment(images[chosen], apart), side))
        assert torch.equal(prepare.batch(source, chosen, once), blocks(expected, p))


@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 16), (torch.float32, 24), (torch.bfloat16, 16)])
def test_levels_are_the_normalised_bytes_however_the_blocks_lie(dtype, side, monkeypatch):
    monkeypatch.setattr(blocks_of, "PIECE", {16: 1000, 24: 10**6}[side])
    images = torch.arange(5 * 3 * side * side).view(5, 3, side, side).to(torch.uint8)
    expected = normalise(blocks(images, 8).flatten(3)).to(dtype)
    lying = blocks(images, 8).permute(3, 4, 5, 1, 0, 2).contiguous().permute(4, 3, 5, 0, 1, 2)
    for given in (images, lying, lying[:3]):
        found = levels(given, 8, dtype)
        assert found.dtype == dtype and torch.equal(found, expected[: len(given)])
    weight, bias = (torch.arange(4 * n).view(4, -1).to(dtype) % 3 for n in (192, 1))
    plain = linear_map(expected.flatten(1, 2), weight, bias.flatten())
    torch.testing.assert_close(embedded(levels(lying, 8, dtype), weight, bias.flatten()), plain)


def test_both_ciphers_say_that_they_only_move_values_in_every_block_alike(key):
    places = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16) * 1_000_003
    for cipher in (pixel_shuffle(key, 8), plain_cipher(key, 8)):
        assert cipher.moves and sorted(cipher.encrypt(places).flatten().tolist()) == places.flatten().tolist()
        assert torch.equal(cipher.decrypt(cipher.encrypt(places)), places)
        block = places[:1, :, :8, :8]
        assert torch.equal(cipher.encrypt(block.tile(1, 1, 2, 3)), cipher.encrypt(block).tile(1, 1, 2, 3))


def test_what_is_freed_is_kept_for_the_next_step():
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 26):
        pytest.skip("another C library may refuse")
    assert keep_freed_memory()
