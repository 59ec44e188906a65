"""Laws that every strategy must hold, and what surrounds them: cohorts, the gate, the roll call, the history."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl.adapter import add
from fl.config import CONF, build, load
from fl.recipe import Recipe
from strategies import ClientInfo, Update
from strategies.gate import Refused, admit
from strategies.history import Evaluation, history_row, totals
from strategies.plan import cohort, evaluates, orders
from strategies.rollcall import MUST_AGREE, Roll, RollCallError, agree

NAMES = ("blocks.0.attn.qkv.q.lora_a.weight", "blocks.0.attn.qkv.q.lora_b.weight", "head.weight")
EVERY = sorted(p.stem for p in (CONF / "strategy").glob("*.yaml"))


def adapter(seed: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=stream) for name in NAMES}


def update(client: int, values: dict, examples: int = 10) -> Update:
    return Update(client, values, examples, {"loss": 1.0, "steps": 3, "seconds": 0.5})


def of_the_readme():
    """The strategy that the README shows, run as it stands there."""
    text = (CONF.parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 25
    names: dict = {}
    exec(code, names)
    return names["fedavgm"](load("").recipe)


@pytest.fixture(params=[*EVERY, "README"])
def strategy(request):
    if request.param == "README":
        return of_the_readme()
    config = load(f"strategy={request.param}")
    return build(config.strategy, recipe=config.recipe)


def one_round(strategy, start: dict, updates: list[Update]) -> dict:
    return strategy.view(strategy.apply(strategy.init(start), 1, updates))


def same(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_there_is_a_strategy_to_hold_to_the_laws():
    assert "fedavg" in EVERY


def test_one_client_returns_its_own_update(strategy):
    same(one_round(strategy, adapter(0), [update(0, adapter(1))]), add(adapter(0), adapter(1)))


def test_the_order_of_clients_does_not_matter(strategy):
    updates = [update(i, adapter(i + 1), 5 * i + 1) for i in range(4)]
    relabelled = [update(i, u.adapter, u.examples) for i, u in enumerate(reversed(updates))]
    same(one_round(strategy, adapter(0), updates), one_round(strategy, adapter(0), relabelled))


def test_identical_clients_are_a_fixed_point(strategy):
    same(one_round(strategy, adapter(0), [update(i, adapter(7), i + 1) for i in range(3)]), add(adapter(0), adapter(7)))


def test_names_and_shapes_are_kept(strategy):
    after = one_round(strategy, adapter(0), [update(0, adapter(1)), update(1, adapter(2))])
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in adapter(0).items()}


def test_inputs_are_not_changed(strategy):
    start, updates = adapter(0), [update(0, adapter(1)), update(1, adapter(2))]
    one_round(strategy, start, updates)
    assert all(torch.equal(start[n], adapter(0)[n]) for n in NAMES)
    assert all(torch.equal(u.adapter[n], adapter(i + 1)[n]) for i, u in enumerate(updates) for n in NAMES)


def test_no_updates_is_an_error(strategy):
    with pytest.raises(ValueError):
        strategy.apply(strategy.init(adapter(0)), 1, [])


def test_what_is_declared_linear_follows_from_weighted_sums_alone(strategy):
    if not strategy.linear:
        return
    one = [update(0, adapter(1), 30)]
    halves = [update(i, adapter(1), 15) for i in range(2)]  # the same sums, from other clients
    same(one_round(strategy, adapter(0), one), one_round(strategy, adapter(0), halves))
    mixed = [update(0, adapter(1), 1), update(1, adapter(2), 3)]
    total = {n: (adapter(1)[n] + 3 * adapter(2)[n]) / 4 for n in NAMES}
    same(one_round(strategy, adapter(0), mixed), one_round(strategy, adapter(0), [update(0, total, 4)]))


def test_fedavg_weighs_by_examples():
    strategy = build({"_target_": "strategies.fedavg.fedavg"}, recipe=Recipe(lr={"head": 0.1}))
    given = {"head.weight": torch.zeros(2)}
    updates = [update(0, {"head.weight": torch.tensor([1.0, 0.0])}, 1), update(1, {"head.weight": torch.tensor([0.0, 4.0])}, 3)]
    assert strategy.apply(given, 1, updates)["head.weight"].tolist() == [0.25, 3.0]


def test_a_cohort_is_a_function_of_seed_and_round_with_every_client_in_turn():
    config = load("fraction=0.3")
    drawn = [cohort(config, round, 10) for round in range(1, 40)]
    assert drawn == [cohort(config, round, 10) for round in range(1, 40)]
    assert all(len(c) == 3 and c == sorted(set(c)) for c in drawn) and set().union(*drawn) == set(range(10))
    assert drawn != [cohort(load("fraction=0.3 seed=1"), round, 10) for round in range(1, 40)]
    assert cohort(load("fraction=0.01"), 1, 10) and cohort(load(""), 1, 10) == list(range(10))


def test_the_last_round_is_always_evaluated_and_rounds_cover_the_run():
    config = load("rounds=5 evaluate_every=2")
    assert [r for r in range(1, 6) if evaluates(config, r)] == [2, 4, 5]
    strategy = build(config.strategy, recipe=config.recipe)
    spans = [orders(strategy, config, adapter(0), r, ClientInfo(0, 5))[0].span for r in range(1, 6)]
    assert spans[0][0] == 0 and spans[-1][1] == 1 and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda a: a["head.weight"].fill_(float("nan")), "head.weight must be finite"),
        (lambda a: a.pop("head.weight"), "'head.weight' is missing"),
        (lambda a: a.update(extra=torch.zeros(1)), "'extra' is unexpected"),
        (lambda a: a.update({"head.weight": torch.zeros(3, 3)}), r"head.weight must be \(2, 3\)"),
        (lambda a: a.update({"head.weight": torch.zeros(2, 3, dtype=torch.float64)}), "float32"),
    ],
)
def test_the_gate_names_the_client_and_the_reason(spoil, says):
    values = adapter(1)
    spoil(values)
    with pytest.raises(Refused, match=f"client 4: .*{says}"):
        admit(update(4, values), adapter(0))


def test_the_gate_lets_a_good_update_pass_unchanged_and_refuses_one_of_no_examples():
    good = update(1, adapter(1))
    assert admit(good, adapter(0)) is good
    with pytest.raises(Refused, match="at least 1 example"):
        admit(update(1, adapter(1), 0), adapter(0))


def roll(client: int, of: int = 3, **changed: str) -> Roll:
    digests = {name: "same" for name in MUST_AGREE} | changed
    return Roll(client, of, digests, 10, 5, 100, 4000, {}, "torch")


def test_clients_that_agree_pass_the_roll_call():
    agree([roll(0), roll(1), roll(2)], "same")


@pytest.mark.parametrize("name", sorted(set(MUST_AGREE) - {"code"}))
def test_the_roll_call_names_the_client_that_differs(name):
    with pytest.raises(RollCallError, match=f"client 1 {MUST_AGREE[name]}"):
        agree([roll(0), roll(1, **{name: "other"}), roll(2)], "same")


@pytest.mark.parametrize(
    "rolls, says",
    [
        ([roll(0), roll(0), roll(2)], "two nodes are client 0"),
        ([roll(0), roll(2)], "no client 1"),
        ([roll(0), roll(1, of=4), roll(2)], "client 1 was told of 4"),
        ([roll(0), roll(1, code="old"), roll(2)], "client 1 runs another version of the code"),
    ],
)
def test_the_roll_call_wants_every_client_once_with_the_servers_code(rolls, says):
    with pytest.raises(RollCallError, match=says):
        agree(rolls, "same")


def test_accuracy_is_the_exact_mean_over_disjoint_shards():
    row = history_row(1, [update(0, adapter(1), 1), update(1, adapter(2), 3)], [Evaluation(0, 2.0, 1, 1), Evaluation(1, 6.0, 1, 3)], [], 9.0)
    assert (row["accuracy"], row["loss"], row["train_loss"], row["train_seconds"]) == (0.5, 2.0, 1.0, 1.0)


def test_the_ratio_counts_both_ways():
    row = {"train_seconds": 1.0, "bytes": {"train down": {"total": 30, "messages": 1}, "train up": {"total": 10, "messages": 1}}}
    assert totals([row, row], full_bytes=90, envelope=10)["ratio_to_full_fedavg"] == pytest.approx((30 + 10) / 200)


def test_strategies_live_one_to_a_file():
    assert {Path(load(f"strategy={name}").strategy["_target_"].replace(".", "/")).parts[1] for name in EVERY} == set(EVERY)
