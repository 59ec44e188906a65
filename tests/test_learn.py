"""The one training loop: what it changes, what it leaves, step by step against formulas; and the one evaluation loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fl.adapter import PATCH_EMBED, digest, group, norm, only, read, sub
from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.course import Prepare
from fl.datasets import Examples
from fl.learn import TrainingError, evaluate, fit, normalise, plain, schedule
from fl.models.full import full
from fl.models.lora_patch import lora_patch
from fl.models.melo import melo
from fl.randomness import derive, generator
from fl.recipe import Recipe

RATES = {"lora_a": 3e-3, "lora_b": 3e-3, "patch_embed": 1e-3, "head": 3e-3, "backbone": 1e-3}
STILL = {"optimizer": "sgd", "momentum": 0.0, "warmup": 0.0, "cosine": False, "clip": 0.0}  # SGD and nothing else


class Linear(nn.Module):
    """Logits W x of one-pixel pictures, from W = 0.1; the three weights' gradient has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2, bias=False)
        nn.init.constant_(self.head.weight, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def dots(n: int) -> Examples:
    """n one-pixel pictures; the red value is the picture's number."""
    images = torch.randint(0, 256, (n, 3, 1, 1), generator=generator(0, "dots"), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    return Examples(images, torch.arange(n) % 2)


def awake(model: nn.Module) -> nn.Module:
    """Random values for head and B, which start at zero, so that everything has a gradient and an effect."""
    for name, parameter in model.named_parameters():
        if group(name) in ("head", "lora_b"):
            nn.init.normal_(parameter, generator=generator(0, name))
    return model


def slope(weight: torch.Tensor, examples: Examples) -> torch.Tensor:
    """d mean(cross-entropy) / dW = (softmax(W x) - y)^T x / n."""
    x = normalise(examples.images).flatten(1)
    return ((x @ weight.T).softmax(-1) - one_hot(examples.labels, 2)).T @ x / len(x)


def test_every_channel_is_normalised_alike_to_one_around_zero():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(x).flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_a_step_of_sgd_is_its_formula():
    model, examples = Linear(), dots(6)
    start = model.head.weight.detach().clone()
    fitted = fit(model, examples, Recipe(lr={"head": 0.5}, batch=6, weight_decay=0.1, **STILL), generator(0, "fit"))
    torch.testing.assert_close(model.head.weight.detach(), start - 0.5 * (slope(start, examples) + 0.1 * start))
    expected = cross_entropy(normalise(examples.images).flatten(1) @ start.T, examples.labels)
    assert fitted.steps == 1 and fitted.seen == 6 and math.isclose(fitted.loss, float(expected), rel_tol=1e-6)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_the_proximal_gradient_is_mu_times_the_way_from_where_it_started(mu):
    model, examples = Linear(), dots(6)
    start = model.head.weight.detach().clone()
    fit(model, examples, Recipe(lr={"head": 0.5}, batch=6, epochs=2, mu=mu, **STILL), generator(0, "fit"))
    first = start - 0.5 * slope(start, examples)
    second = first - 0.5 * (slope(first, examples) + mu * (first - start))
    torch.testing.assert_close(model.head.weight.detach(), second)


def test_the_rate_of_each_step_follows_the_schedule():
    model, examples = Linear(), dots(6)
    weight = model.head.weight.detach().clone()
    fit(model, examples, Recipe(lr={"head": 0.5}, batch=6, epochs=4, **STILL | {"cosine": True}), generator(0, "fit"))
    for share in (1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2):
        weight = weight - 0.5 * share * slope(weight, examples)
    torch.testing.assert_close(model.head.weight.detach(), weight)


def test_the_clip_bounds_the_norm_of_a_step():
    model = Linear()
    before = read(model)
    fit(model, dots(6), Recipe(lr={"head": 1.0}, batch=6, **STILL | {"clip": 0.01}), generator(0, "fit"))
    assert math.isclose(norm(sub(read(model), before)), 0.01, rel_tol=1e-3)


def test_warm_up_and_cosine_by_hand():
    def at(t: float, **change) -> float:
        return schedule(Recipe(lr={}, **{"warmup": 0.2} | change), t)

    assert at(0.1) == 0.5 and at(0.2) == 1.0 and math.isclose(at(0.6), 0.5) and at(1.0) < 1e-12
    assert 0 < at(0.0) < 0.01 and at(0.0, warmup=0.0) == 1.0 and at(0.9, cosine=False) == 1.0
    assert at(0.5, span=(0.2, 0.6)) == at(0.4)


@pytest.mark.parametrize("warmup", [0.0, 1e-4, 0.1, 0.35])
def test_the_schedule_runs_on_over_rounds_and_never_above_the_peak(warmup):
    rounds = [Recipe(lr={}, warmup=warmup, span=(r / 4, (r + 1) / 4)) for r in range(4)]
    rates = [schedule(recipe, step / 50) for recipe in rounds for step in range(50)]
    once = [schedule(Recipe(lr={}, warmup=warmup), step / 200) for step in range(200)]
    assert rates == pytest.approx(once, abs=1e-9) and max(rates) <= 1
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.06


@pytest.mark.parametrize(
    ("n", "batch", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (3, 2, [3]), (5, 2, [2, 3]), (2, 2, [2]), (2, 32, [2]), (33, 32, [33])],
)
def test_no_step_ever_sees_one_image_and_every_epoch_sees_all(n, batch, sizes):
    seen: list[list[int]] = []

    def watch(images, chosen, stream):
        seen.append(images[chosen, 0, 0, 0].tolist())
        return images[chosen]

    fitted = fit(Linear(), dots(n), Recipe(lr={"head": 0.1}, batch=batch, epochs=3, **STILL), generator(0, "fit"), Prepare(watch))
    assert [len(s) for s in seen] == sizes * 3 and fitted.steps == len(seen) and fitted.seen == 3 * n
    epochs = [sum(seen[i : i + len(sizes)], []) for i in range(0, len(seen), len(sizes))]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 8 or epochs[0] != epochs[1]


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    with pytest.raises(TrainingError, match=f"at least 2 images, got {n}"):
        fit(Linear(), dots(n), Recipe(lr={"head": 0.1}), generator(0, "fit"))


def test_a_group_without_a_rate_is_refused_by_name(tiny, forty):
    with pytest.raises(TrainingError, match="none for lora_b, patch_embed"):
        fit(tiny(lora_patch(2)), forty, Recipe(lr={"head": 0.1, "lora_a": 0.1}), generator(0, "fit"))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(broken):
    model = Linear()
    nn.init.constant_(model.head.weight, broken)
    with pytest.raises(TrainingError, match="lower recipe.lr"):
        fit(model, dots(6), Recipe(lr={"head": 0.1}), generator(0, "fit"))


@pytest.mark.parametrize("method", [lora_patch(2), melo(2)], ids=["lora_patch", "melo"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_weights_keep_every_bit_and_trained_ones_move(method, optimizer, tiny, forty):
    model = tiny(method)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    recipe = Recipe(lr={g: 0.05 for g in RATES}, optimizer=optimizer, batch=8, epochs=2, weight_decay=0.1, mu=0.1)
    fit(model, forty, recipe, generator(0, "fit"))
    trained = set(read(model))
    after = model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == trained


def test_the_loss_falls_and_the_classes_are_learnt(tiny, forty):
    model = tiny(full())
    before = evaluate(model, forty)
    recipe = Recipe(lr=dict.fromkeys(RATES, 3e-3), batch=8, epochs=8)
    first = fit(model, forty, Recipe(lr=dict.fromkeys(RATES, 3e-3), batch=8), generator(0, "a"))
    last = fit(model, forty, recipe, generator(0, "b"))
    after = evaluate(model, forty)
    assert math.isclose(before.loss / 40, math.log(3), rel_tol=1e-5)  # the head starts at zero
    assert last.loss < first.loss and after.loss < before.loss / 2 and after.correct > 36


def test_the_same_stream_gives_the_same_bytes_and_another_gives_others(tiny, forty):
    def noisy(images: torch.Tensor, chosen: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        x = images[chosen]
        return x ^ torch.randint(0, 2, x.shape, generator=stream, dtype=torch.uint8)

    def trained(seed: int) -> str:
        model = tiny(lora_patch(2))
        fit(model, forty, Recipe(lr=RATES, batch=8), generator(seed, "fit"), Prepare(noisy))
        return digest(read(model))

    assert trained(0) == trained(0) != trained(1)


def test_streams_are_named_and_pinned_for_ever():
    assert derive(0, "x", 1) == 1721122313873992475
    names = [(0, "x"), (1, "x"), (0, "y"), (0, "x", 1), (0, "x", 12), (0, "x", 1, 2), (0, "x1")]
    assert len({derive(*n) for n in names}) == len(names) and all(0 <= derive(*n) < 2**63 for n in names)
    assert torch.equal(torch.rand(3, generator=generator(0, "x")), torch.rand(3, generator=generator(0, "x")))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("still", ["patch_embed", "lora_a", "head"])
def test_a_group_of_rate_zero_does_not_move_and_the_others_do(still, optimizer, tiny, forty):
    model = awake(tiny(lora_patch(2)))
    before = read(model)
    recipe = Recipe(lr=dict.fromkeys(RATES, 1e-2) | {still: 0.0}, optimizer=optimizer, batch=8, weight_decay=0.0)
    fit(model, forty, recipe, generator(0, "fit"))
    moved = {n for n, t in sub(read(model), before).items() if t.any()}
    assert moved == {n for n in before if group(n) != still}


@pytest.mark.parametrize("chosen", [(), ("lora_b", "head"), ("lora_a",), ("backbone", "head")])
def test_only_the_chosen_groups_train_and_then_all_may_again(chosen, tiny, forty):
    model = awake(tiny(lora_patch(2)))
    before = read(model)
    with only(model, chosen):
        fit(model, forty, Recipe(lr=dict.fromkeys(RATES, 1e-2), batch=8, weight_decay=0.1), generator(0, "fit"))
        assert set(read(model)) == {n for n in before if not chosen or group(n) in chosen}
    after = read(model)
    assert {n for n in before if not torch.equal(after[n], before[n])} == {n for n in before if not chosen or group(n) in chosen}
    with pytest.raises(TrainingError), only(model, chosen):
        fit(model, forty, Recipe(lr={}), generator(0, "fit"))
    assert set(read(model)) == set(before)


def test_bfloat16_trains_float32_weights_to_nearly_the_same(tiny, forty):
    results = {}
    for precision in ("float32", "bfloat16"):
        model = tiny(full())
        forward = plain(model, precision)
        fit(model, forty, Recipe(lr=RATES, batch=8), generator(0, "fit"), forward=forward)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        results[precision] = evaluate(model, forty, forward).loss
    assert results["float32"] != results["bfloat16"] == pytest.approx(results["float32"], rel=0.05)


def test_an_evaluation_is_the_direct_sum_whatever_the_batch(tiny, forty):
    model = awake(tiny())
    logits = model(normalise(forty.images)).detach()
    expected = float(cross_entropy(logits, forty.labels, reduction="sum"))
    right = sum(int(max(range(3), key=row.__getitem__) == label) for row, label in zip(logits.tolist(), forty.labels.tolist()))
    assert 0 < right < 40
    for batch in (1, 7, 40, 250):
        score = evaluate(model, forty, batch=batch)
        assert score.correct == right and score.examples == 40 and score.loss == pytest.approx(expected, rel=1e-5)
    parts = [evaluate(model, forty.at(i)) for i in torch.arange(40).split(13)]
    assert sum(p.correct for p in parts) == right and sum(p.loss for p in parts) == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_changes_nothing(tiny, forty):
    model = tiny(full())
    before = digest(model.state_dict())
    evaluate(model, forty)
    assert digest(model.state_dict()) == before and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        (Recipe(lr=dict.fromkeys(RATES, 0.05), optimizer="sgd", batch=8, epochs=2, mu=0.1), 1e-5),
        (Recipe(lr=RATES, batch=8, epochs=2, weight_decay=0.05), 1e-3),
    ],
    ids=["sgd", "adamw"],
)
def test_training_on_encrypted_images_from_a_keyed_start_is_training_on_plain_ones(recipe, tolerance, tiny, forty, key):
    cipher = pixel_shuffle(key, 8)
    clear, keyed, public = (tiny(lora_patch(2)) for _ in range(3))
    start = read(clear)
    with torch.no_grad():
        keyed.get_parameter(PATCH_EMBED).copy_(cipher.absorb(start[PATCH_EMBED]))
    encrypted = Examples(cipher.encrypt(forty.images), forty.labels)
    fit(clear, forty, recipe, generator(0, "fit"))
    fit(keyed, encrypted, recipe, generator(0, "fit"))
    fit(public, encrypted, recipe, generator(0, "fit"))

    def released(model) -> dict:
        return dict(read(model)) | {PATCH_EMBED: cipher.release(model.get_parameter(PATCH_EMBED).detach())}

    moved = norm(sub(read(clear), start))
    assert norm(sub(released(keyed), read(clear))) / moved < tolerance
    assert norm(sub(read(public), read(clear))) / moved > 100 * tolerance  # without the key it is other training
    assert evaluate(keyed, encrypted).loss == pytest.approx(evaluate(clear, forty).loss, rel=tolerance)


@pytest.mark.parametrize("deadline, steps", [(0.0, 8), (100.0, 8), (2.5, 3), (1e-9, 1)])
def test_training_stops_at_its_deadline_with_what_it_has_and_never_before_a_step(monkeypatch, deadline, steps):
    """Every step takes a second. What is left out is left out whole: the steps taken are those of a run without a deadline."""
    clock = iter(range(100))
    monkeypatch.setattr("fl.learn.time.monotonic", lambda: float(next(clock)))
    model, recipe = Linear(), Recipe(lr=RATES, batch=4, **STILL)
    found = fit(model, dots(32), replace(recipe, deadline=deadline), generator(0, "x"))
    assert (found.steps, found.seen) == (steps, 4 * steps)
    whole = Linear()
    order = torch.randperm(32, generator=generator(0, "x"))[: 4 * steps]
    for batch in order.split(4):
        whole.head.weight.data -= RATES["head"] * slope(whole.head.weight.data, dots(32).at(batch))
    assert torch.allclose(model.head.weight, whole.head.weight, atol=1e-6)
