"""SCAFFOLD: what the client adds and returns, what the server keeps, and that drift does not move the optimum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import first
from test_personal import kept, rows
from test_simulation import by_flower, by_loop, equal, home, result, settings  # noqa: F401

from clients import carried, local
from clients.state import Drawer
from fl.adapter import PATCH_EMBED, apart, average, group, move, read, ride, sub
from fl.config import load
from fl.learn import fit
from fl.models.lora_patch import lora_patch
from fl.randomness import generator
from fl.recipe import Recipe
from strategies import Update
from strategies.fedavg import fedavg
from strategies.scaffold import scaffold

SGD = "strategy=scaffold recipe.optimizer=sgd recipe.momentum=0 recipe.clip=0 recipe.cosine=false recipe.warmup=0"


def noise(like: dict, seed: int, size: float = 0.01) -> dict:
    return {n: size * torch.randn(t.shape, generator=generator(seed, n)) for n, t in like.items()}


def test_the_client_returns_option_two_under_plain_sgd_at_a_constant_rate(home, tmp_path):
    """c_k+ = c_k - c + (w - w_k) / (steps * rate), here from a c_k and a c that are not zero, with the keyed start."""
    config = load(settings(home, tmp_path, "clients=3", SGD))
    client, recipe = local.open_client(config, 1, 3), replace(config.recipe, control=True)
    start, drawer = client.bench.start, Drawer(config.state, "run", 1)
    start = move(start, noise(start, 3))  # B is not zero, so that A has a gradient
    c, own = noise(start, 1), noise(start, 2)
    drawer.keep(carried.CONTROL, 1, own)
    update, _, metrics = local.train(client, 2, recipe, {**start, **ride("control", c)}, False, "run")
    came = apart(update)
    after = drawer.recall(carried.CONTROL, 2)[1]
    assert set(came.own) == set(came.control) == set(after) == set(start)
    for name in start:
        second = own[name] - c[name] - came.own[name] / (metrics["steps"] * recipe.lr[group(name)])
        torch.testing.assert_close(after[name], second, rtol=1e-3, atol=3e-5)
        torch.testing.assert_close(came.control[name], (after[name] - own[name]) / 3, rtol=1e-6, atol=1e-9)


def test_a_correction_is_added_before_clipping_and_not_returned(tiny, forty):
    recipe = Recipe(lr={g: 0.1 for g in ("lora_a", "lora_b", "head", "patch_embed")}, optimizer="sgd", momentum=0, warmup=0, cosine=False, clip=1e9, batch=40)
    model, other = tiny(lora_patch(2)), tiny(lora_patch(2))
    start, shift = read(model), noise(read(model), 1)
    plain = fit(model, forty, recipe, generator(0))
    moved = fit(other, forty, recipe, generator(0), correction=shift)
    assert plain.gradient is None and moved.steps == 1
    for name, by in sub(read(model), read(other)).items():
        torch.testing.assert_close(by, 0.1 * shift[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moved.gradient[name], (start[name] - read(model)[name]) / 0.1, rtol=1e-3, atol=1e-5)
    bound = tiny(lora_patch(2))
    fit(bound, forty, replace(recipe, clip=0.5), generator(0), correction={n: 100 * t for n, t in shift.items()})
    steps = sub(read(bound), start)
    assert sum(float(t.norm()) ** 2 for t in steps.values()) ** 0.5 == pytest.approx(0.05, rel=1e-3)
    with pytest.raises(ValueError, match="'stranger' is unexpected"):
        fit(tiny(lora_patch(2)), forty, recipe, generator(0), correction={"stranger": torch.zeros(1)})


def test_with_variates_at_zero_the_first_round_is_fedavgs(home, tmp_path):
    (_, ours), (_, plain) = (by_loop(home, tmp_path / s, SGD, "rounds=1", f"strategy={s}") for s in ("scaffold", "fedavg"))
    assert equal(ours, plain)
    (_, ours), (_, plain) = (by_loop(home, tmp_path / f"{s}2", SGD, "rounds=2", f"strategy={s}") for s in ("scaffold", "fedavg"))
    assert not equal(ours, plain)


def test_the_servers_weights_are_fedavgs_at_its_own_rate():
    start = {"head.weight": torch.tensor([1.0, 2.0])}
    updates = [Update(k, {"head.weight": torch.tensor([0.5 * k, 1.0])}, k, {}) for k in (1, 3)]
    variates = [ride("control", {"head.weight": torch.tensor([0.25, float(k)])}) for k in (1, 3)]
    sent = [u._replace(adapter={**u.adapter, **v}) for u, v in zip(updates, variates)]
    plain = fedavg(Recipe(lr={})).apply(start, 1, updates)["head.weight"]
    for rate in (1.0, 0.5):
        strategy = scaffold(Recipe(lr={}), rate)
        state = strategy.apply(strategy.init(start), 1, iter(sent))
        assert torch.equal(strategy.view(state)["head.weight"], start["head.weight"] + rate * (plain - start["head.weight"]))
        assert apart(state).control["head.weight"].tolist() == [0.5, 4.0]  # a sum of shares, however many images


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_c_is_the_mean_of_all_clients_variates(home, tmp_path, fraction):
    """Of those that never trained, too: theirs are zero."""
    sent = []

    def seen(client, round, recipe, given, *more):
        sent.append(apart(given).control)
        return local.train(client, round, recipe, given, *more)

    by_loop(home, tmp_path, SGD, f"rounds=3 fraction={fraction}", train=seen)
    held: dict = {}
    for index in range(3):
        found = Drawer(str(tmp_path / "state"), "loop", index).recall(carried.CONTROL, 2)
        held[index] = found[1] if found else {n: torch.zeros_like(t) for n, t in sent[0].items()}
    for name, c in sent[-1].items():
        torch.testing.assert_close(c, sum(h[name] for h in held.values()) / 3, rtol=1e-4, atol=1e-7)
    assert any(c.any() for c in sent[-1].values()) and not any(c.any() for c in sent[0].values())


def test_on_a_quadratic_drift_moves_fedavgs_optimum_and_not_this_one(tmp_path):
    """Losses (x + 1)^2 / 2 and 9 (x - 1)^2 / 2: together least at 0.8. Twenty local steps pull the flat one as far as the steep one."""
    losses, rate, steps = [(1.0, -1.0), (9.0, 1.0)], 0.1, 20
    strategy = scaffold(Recipe(lr={}))

    def client(k: int, w: torch.Tensor, correction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (a, b), x, total = losses[k], w.clone(), torch.zeros(1)
        for _ in range(steps):
            total += a * (x - b)
            x -= rate * (a * (x - b) + correction)
        return x - w, total / steps

    plain = torch.zeros(1)
    state = strategy.init({"head.weight": torch.zeros(1)})
    for round in range(1, 61):
        plain = plain + average([({"x": client(k, plain, torch.zeros(1))[0]}, 1) for k in (0, 1)])["x"]
        (w, c), updates = (part["head.weight"] for part in apart(state)[:2]), []
        for k in (0, 1):
            drawer = Drawer(str(tmp_path), "run", k)
            own = carried.variate(drawer, round, {"head.weight": c})
            step, gradient = client(k, w, c - own["head.weight"])
            share = carried.renew(drawer, round, own, {"head.weight": gradient}, 2)
            updates.append(Update(k, {"head.weight": step, **share}, 1, {}))
        state = strategy.apply(state, round, updates)
    assert float(strategy.view(state)["head.weight"]) == pytest.approx(0.8, abs=1e-4)
    assert abs(float(plain) - 0.8) > 0.5


@pytest.mark.parametrize("more", first(1, list(["", "fraction=0.6 rounds=3 recipe.augment=true", "recipe.keep=[head] rounds=3"])))
def test_flower_equals_the_plain_loop_under_control(home, tmp_path, more):
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path, SGD, more), by_flower(home, tmp_path, SGD, more)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"]
    assert equal(kept(tmp_path), kept(tmp_path, result(tmp_path)[0]["run"]))


def test_variates_are_counted_apart_and_cost_what_the_weights_do(home, tmp_path):
    summary, adapter = by_flower(home, tmp_path, SGD)
    for way in ("train up", "train down"):
        sizes = summary["bytes"][way]
        assert sizes["control"] == sizes["messages"] * sum(4 * t.numel() for t in adapter.values()) == sum(sizes[g] for g in ("lora_a", "lora_b", "patch_embed", "head"))
    assert "control" not in summary["bytes"]["evaluate down"] and not apart(adapter).control
    norms = rows(tmp_path, result(tmp_path)[0]["run"])[0]["clients"][0]["norms"]
    assert set(norms) == {"lora_a", "lora_b", "patch_embed", "head", "control"}


def test_variates_travel_and_lie_in_plain_order(home, tmp_path):
    by_loop(home, tmp_path / "a", SGD)
    by_loop(home, tmp_path / "b", SGD, "cipher=plain start=public")
    name = f"client-000/control-00002.safetensors {PATCH_EMBED}"
    keyed, plain = kept(tmp_path / "a")[name], kept(tmp_path / "b")[name]
    assert float((keyed - plain).norm()) < 1e-3 * float(plain.norm())
