"""How long an update may be: honest ones never come near the bound, and nobody gets far beyond what they measure."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import first
from test_simulation import by_flower, by_loop, home, settings  # noqa: F401

from clients import local
from fl.adapter import flat, norm, ride, sub
from fl.adapter import load as load_adapter
from fl.config import CONF, load
from fl.flat import Flat
from fl.recipe import Recipe, schedule
from strategies import lengths
from strategies.checkpoint import Checkpoints
from strategies.gate import Refused
from strategies.lengths import GREATEST, ROUNDS, SLACK, Length, Lengths, Schedule, measured, reach, way

STRATEGIES = ["fedavg", "scaffold", "rolora"] + sorted({path.stem for path in (CONF / "strategy").glob("*.yaml")} - {"fedavg", "scaffold", "rolora"})
LR = {"head": 0.1, "lora_a": 0.2}
GIVEN = {"head.weight": torch.ones(3, 3), "blocks.0.attn.qkv.q.lora_a.weight": torch.zeros(2, 8)}
FLAT = dict(warmup=0.0, cosine=False)


def test_reach_by_hand():
    adam = Recipe(lr=LR, **FLAT)
    assert reach(adam, GIVEN, 10).own == pytest.approx(math.sqrt(9 * 1.0**2 + 16 * 2.0**2))
    sgd = Recipe(lr=LR, optimizer="sgd", momentum=0.5, clip=3.0, **FLAT)
    assert reach(sgd, GIVEN, 10).own == pytest.approx(0.2 * 3 * 10 / 0.5)
    decaying = Recipe(lr=LR, weight_decay=0.1, **FLAT)
    assert reach(decaying, GIVEN, 10).own - reach(adam, GIVEN, 10).own == pytest.approx(0.2 * 0.1 * 10 * 3)
    assert reach(Recipe(lr=LR, groups=("head",), **FLAT), GIVEN, 10).own == pytest.approx(3)
    assert reach(Recipe(lr=LR, keep=("head", "lora_a"), **FLAT), GIVEN, 10) == Length(0, GREATEST)


def test_the_way_of_a_round_is_the_sum_of_its_rates_or_of_a_round_before():
    flat = Schedule((0.0, 0.5), 0.0, False)
    assert way(flat, 7) == pytest.approx(7)
    assert way(Schedule((0.0, 0.1), 0.1, False), 4) == pytest.approx(0.01 + 0.25 + 0.5 + 0.75), "warming up: the first step is a hundredth"
    last, before = Schedule((0.9, 1.0), 0.0, True), Schedule((0.4, 0.5), 0.0, True)
    assert way(last, 5) == pytest.approx(sum(schedule(before, k / 5) for k in range(5))), "what was lost then may come now"
    assert way(Schedule((0.5, 1.0), 0.0, True), 3) > 2, "of two rounds the first"


def test_a_first_round_of_one_small_step_leaves_room_for_the_second(home, tmp_path):  # noqa: F811
    """Thirty images a client are one step, and the run's first step is a hundredth of the peak rate."""
    summary, _ = by_loop(home, tmp_path, "rounds=2 recipe.batch=256")
    assert summary["rounds"] == 2


def test_before_there_is_a_median_the_recipe_bounds_and_then_the_median_does():
    limits, whole = Lengths(10.0), Length(4.0, 2.0)
    assert limits.longest(whole) == Length(4 * SLACK, 2 * SLACK)
    for long in (1.0, 2.0, 6.0):
        limits.see({"head.weight": torch.tensor([long])}, whole)
    assert limits.longest(whole) == Length(4 * SLACK, 2 * SLACK), "what a round brings counts from the next one on"
    limits.commit()
    assert limits.longest(whole) == Length(20.0, 2 * SLACK) and limits.longest(Length(8.0, 2.0)).own == 40.0
    limits.see({"head.weight": torch.tensor([1e3])}, whole)
    limits.begin()
    limits.commit()
    assert limits.longest(whole).own == 20.0, "an attempt that failed left nothing"
    again = Lengths(10.0)
    again.recall(limits.kept())
    assert again.longest(whole) == limits.longest(whole) and again.kept() == limits.kept()
    for _ in range(ROUNDS):
        limits.commit()
    assert limits.longest(whole).own == 4 * SLACK


def test_variates_have_a_median_of_their_own():
    update = {"head.weight": torch.tensor([3.0]), **ride("control", {"head.weight": torch.tensor([4.0])})}
    assert measured(update) == Length(3.0, 4.0)


@pytest.mark.parametrize("name", first(3, STRATEGIES))
def test_an_honest_run_never_comes_near_its_bound(home, tmp_path, monkeypatch, name):
    """Unlike clients, six rounds, the default codec: at most half of what is allowed, under every strategy."""
    shares, real = [], Lengths.see

    def see(self, update, whole):
        shares.extend(m / most for m, most in zip(measured(update), self.longest(whole)) if most)
        real(self, update, whole)

    monkeypatch.setattr(lengths.Lengths, "see", see)
    method = "method=lora_sb" if name == "fed_sb" else ""
    by_loop(home, tmp_path, f"strategy={name} {method} clients=5 data.train=300 rounds=6 evaluate_every=6 partition=dirichlet recipe.batch=8")
    assert len(shares) >= 30 or name == "local_only"
    assert max(shares, default=0) < 0.5


@pytest.mark.parametrize("more", first(1, ["recipe.optimizer=sgd", "recipe.optimizer=sgd recipe.clip=0 recipe.momentum=0", "method=full start=public", "recipe.weight_decay=0.1", "codec=low_rank"]))
def test_other_recipes_do_not_come_near_it_either(home, tmp_path, more):
    by_loop(home, tmp_path, more, "rounds=4", "gate.norm=5")


def shouting(by: float, index: int, round_: int):
    """A client that sends ``by`` times what it found in one round."""

    def train(client, round, *more):
        update, examples, metrics = real(client, round, *more)
        if (client.index, round) != (index, round_):
            return update, examples, metrics
        whole = flat(update)
        return Flat(by * whole.buffer, whole.layout), examples, metrics

    real = local.train
    return train


@pytest.mark.parametrize("round", [1, 2])
def test_one_client_that_shouts_is_left_out_and_the_model_is_what_the_others_make_of_it(home, tmp_path, monkeypatch, capsys, round):
    """M10: it moved the model by 233; now by nothing, and in the round after it is heard again."""
    monkeypatch.setattr(local, "train", shouting(1000.0, 1, round))
    by_flower(home, tmp_path, "rounds=3 quorum=0.6 codec=float32")
    out = capsys.readouterr().out
    assert out.count("left out (norm): client 1") == 1 and f"round {round}: left out (norm)" in out


def test_what_passes_moves_the_model_by_at_most_factor_times_the_median(home, tmp_path, monkeypatch):
    honest, adapters = [], []
    real = Lengths.see

    def see(self, update, whole):
        honest.append((measured(update).own, self.longest(whole).own))
        real(self, update, whole)

    monkeypatch.setattr(lengths.Lengths, "see", see)
    settings_ = "rounds=2 codec=float32 gate.norm=4"
    _, quiet = by_loop(home, tmp_path / "honest", settings_)
    own, limit = honest[4]  # client 1 in round 2
    middle = sorted(long for long, _ in honest[:3])[1]
    assert limit < 2 * 4 * middle, "all are of one reach, but for the rates of the round"
    moved = []
    for by in (2.0, 8.0, 64.0):
        try:
            _, adapter = by_loop(home, tmp_path / str(by), settings_, train=shouting(by, 1, 2))
        except Refused as reason:
            assert reason.code == "norm" and by * own > limit
            continue
        moved.append(norm(sub(adapter, quiet)))
    assert moved and len(moved) < 3, "a little louder passes, and no shout"
    assert max(moved) <= (limit + own) / 3  # one of three clients, of as many images each


def test_a_resumed_run_has_the_medians_of_the_first(home, tmp_path):
    by_flower(home, tmp_path, "rounds=2 codec=float32")
    config = load(settings(home, tmp_path, "rounds=2 codec=float32"))
    folder = next(tmp_path.glob("demo-*"))
    _, kept = Checkpoints(folder / "checkpoints", config).newest()
    assert [len(round) for round in kept["lengths"]] == [3, 3]
    assert all(0 < own < 1 and control == 0 for round in kept["lengths"] for own, control in round)
    assert load_adapter(folder / "adapter.safetensors")
