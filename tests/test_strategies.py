"""Laws that every strategy must hold, and what surrounds them: cohorts, the gate, the roll call, the history."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from fl.adapter import apart, group, move, ordered, part, ride
from fl.base import modules, product
from fl.config import CONF, ConfigError, build, load
from fl.recipe import Recipe
from fl.tree import described, rebuilt
from strategies import ClientInfo, Update
from strategies.catchup import Catchup
from strategies.gate import Refused, admit
from strategies.history import Evaluation, Watch, history_row, totals
from strategies.plan import cohort, enough, evaluates, one_rank, orders
from strategies.rollcall import MUST_AGREE, Roll, RollCallError, agree

A, B, HEAD = "blocks.0.attn.qkv.q.lora_a.weight", "blocks.0.attn.qkv.q.lora_b.weight", "head.weight"
SHAPES = {A: (2, 3), B: (4, 2), HEAD: (2, 3)}
R = "blocks.0.attn.qkv.q.lora_r.weight"
EVERY = sorted(p.stem for p in (CONF / "strategy").glob("*.yaml"))


def adapter(seed: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream) for name, shape in SHAPES.items()}


def update(client: int, values: dict, examples: int = 10) -> Update:
    return Update(client, values, examples, {"loss": 1.0, "steps": 3, "seconds": 0.5})


def crowd(n: int) -> list[Update]:
    return [update(i, adapter(i + 1), 5 * i + 1) for i in range(n)]


def suited(strategy, monkeypatch):
    """``strategy``, and where it refuses the message of these laws for the want of a core R between the factors, one with R."""
    try:
        strategy.init(adapter(0))
    except ConfigError as error:
        assert "needs a core R" in str(error)
        monkeypatch.setitem(SHAPES, R, (2, 2))
    return strategy


def of_the_readme():
    """The strategy that the README shows, run as it stands there."""
    text = (CONF.parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 25
    names: dict = {}
    exec(code, names)
    return names["lookahead"](load("").recipe)


@pytest.fixture(params=[*EVERY, "README"])
def strategy(request, monkeypatch):
    """Every strategy as its YAML has it."""
    if request.param == "README":
        return of_the_readme()
    config = load(f"strategy={request.param}")
    return suited(build(config.strategy, recipe=config.recipe), monkeypatch)


@pytest.fixture(params=[*EVERY, "README"])
def neutral(request, monkeypatch):
    """Every strategy, set so that the server does nothing to an update on which all agree; told by the settings it takes.

    An adaptive server takes ``rates`` and moves a coordinate by its rate, not by what the clients found: with no memory, a
    floor tau far above any update and a rate to undo it (v stays tau^2, so that sqrt(v) + tau = 2 tau) it must be the plain
    mean. One that cuts a product's ``energy`` must keep it whole when it is to keep all.
    """
    if request.param == "README":
        return of_the_readme()
    config = load(f"strategy={request.param}")
    takes = inspect.signature(get_object(config.strategy["_target_"])).parameters
    change = {"rates": {}, "rate": 2e8, "tau": 1e8, "beta1": 0.0, "beta2": 1 - 1e-12} if "rates" in takes else {"energy": 1.0}
    return suited(build(config.strategy | {n: value for n, value in change.items() if n in takes}, recipe=config.recipe), monkeypatch)


def asked(strategy, start: dict, values: dict) -> tuple[dict, dict]:
    """What a client has when it has received its orders for round 1, and of ``values`` what it would send back.

    What it is not sent and yet trains it keeps at home, and starts from what all start from.
    """
    recipe, given = strategy.ask(strategy.init(start), 1, ClientInfo(0, 10))
    assert all(group(name) in recipe.keep for name in start if name not in given)
    sent = recipe.sent(values)
    return start | given, {**sent, **(ride("control", sent) if recipe.control else {})}


def one_round(strategy, start: dict, updates: list[Update]) -> dict:
    sent = [u._replace(adapter=asked(strategy, start, u.adapter)[1]) for u in updates]
    return whole(strategy, strategy.apply(strategy.init(start), 1, sent))


def whole(strategy, state) -> dict:
    """The global adapter, and how the base has changed where the strategy changes it."""
    return Catchup(strategy).whole(state, strategy.view(state))


def fewest(strategy) -> int:
    """How many clients a round must have: one, unless the strategy itself says otherwise when it gets one."""
    try:
        one_round(strategy, adapter(0), crowd(1))
    except ConfigError as error:
        return int(re.search(r"needs (?:at least )?(\d+) clients in a round, got 1; ", str(error))[1])
    return 1


def effect(adapter: dict) -> dict:
    """What the model sees: the product of the factors, in whatever axes they come, with the base's change, and the rest."""
    own, _, change = apart(adapter)
    into = sum(product(change, module) for module in modules(change)).float() if change else 0
    return {"product": own[B] @ own.get(R, torch.eye(2)) @ own[A] + into, "head": own[HEAD]}


def test_a_state_that_was_written_down_goes_on_as_if_it_had_not_been(strategy):
    """Through JSON and bytes and back between two rounds, as a checkpoint has it: the same to the bit."""
    def turn(state, round: int):
        updates = []
        for u in crowd(max(7, fewest(strategy))):
            recipe, _ = strategy.ask(state, round, ClientInfo(u.client, u.examples))
            sent = recipe.sent(u.adapter)
            updates.append(u._replace(adapter={**sent, **(ride("control", sent) if recipe.control else {})}))
        return strategy.apply(state, round, updates)

    first = turn(strategy.init(adapter(0)), 1)
    shape, tensors = described(first)
    back = rebuilt(json.loads(json.dumps(shape)), load_bytes(save_bytes({n: t.clone().contiguous() for n, t in tensors.items()})))
    kept, again = whole(strategy, turn(first, 2)), whole(strategy, turn(back, 2))
    assert kept.keys() == again.keys() and all(torch.equal(kept[n], again[n]) for n in kept)



def same(a: dict, b: dict) -> None:
    torch.testing.assert_close(effect(a), effect(b), rtol=1e-5, atol=3e-6)


def test_there_is_a_strategy_to_hold_to_the_laws():
    assert "fedavg" in EVERY


def test_one_client_returns_its_own_update_where_one_is_enough(neutral):
    if fewest(neutral) == 1:
        same(one_round(neutral, adapter(0), crowd(1)), move(*asked(neutral, adapter(0), adapter(1))))


def test_a_rule_that_needs_more_clients_works_with_as_many_as_it_says_and_more_and_no_fewer(strategy):
    least = fewest(strategy)
    for number in range(least, least + 11):
        one_round(strategy, adapter(0), crowd(number))
    for too_few in range(1, least):
        with pytest.raises(ConfigError, match=f"needs (at least )?{least} clients in a round, got {too_few}; raise clients or fraction"):
            one_round(strategy, adapter(0), crowd(too_few))


def test_the_order_of_clients_does_not_matter(strategy):
    updates = crowd(max(4, fewest(strategy)))
    relabelled = [update(i, u.adapter, u.examples) for i, u in enumerate(reversed(updates))]
    same(one_round(strategy, adapter(0), updates), one_round(strategy, adapter(0), relabelled))


def test_identical_clients_are_a_fixed_point(neutral):
    updates = [update(i, adapter(7), i + 1) for i in range(max(3, fewest(neutral)))]
    same(one_round(neutral, adapter(0), updates), move(*asked(neutral, adapter(0), adapter(7))))


def test_a_round_in_which_nobody_moved_changes_nothing(neutral):
    still = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    same(one_round(neutral, adapter(0), [update(i, still, i + 1) for i in range(max(3, fewest(neutral)))]), adapter(0))


def test_names_shapes_and_dtypes_are_kept(strategy):
    after = apart(one_round(strategy, adapter(0), crowd(max(2, fewest(strategy))))).own
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in adapter(0).items()}
    assert list(after) == ordered(SHAPES)


def test_inputs_and_states_are_not_changed(strategy):
    start, updates = adapter(0), crowd(max(2, fewest(strategy)))
    one_round(strategy, start, updates)
    assert all(torch.equal(start[n], adapter(0)[n]) for n in SHAPES)
    assert all(torch.equal(u.adapter[n], adapter(i + 1)[n]) for i, u in enumerate(updates) for n in SHAPES)
    state = strategy.init(start)
    sent = [u._replace(adapter=asked(strategy, start, u.adapter)[1]) for u in updates]
    once, twice = (whole(strategy, strategy.apply(state, 1, sent)) for _ in range(2))
    assert all(torch.equal(once[n], twice[n]) for n in once)


@pytest.mark.parametrize("name", EVERY)
def test_a_head_that_stays_at_home_is_left_as_it_was_and_the_rest_is_not(name, monkeypatch):
    config = load(f"strategy={name} recipe.keep=[head]")
    strategy = suited(build(config.strategy, recipe=config.recipe), monkeypatch)
    updates = crowd(max(3, fewest(strategy)))
    assert not any(group(n) == "head" for n in asked(strategy, adapter(0), adapter(1))[1])
    after, still = effect(one_round(strategy, adapter(0), updates)), effect(adapter(0))
    torch.testing.assert_close(after["head"], still["head"])
    sends = asked(strategy, adapter(0), adapter(1))[1]
    assert torch.allclose(after["product"], still["product"]) == (B not in sends and A not in sends)


PRODUCTS = ("fed_sb", "fedex_lora", "fedrot_lora", "fedsvd", "flexlora", "flora", "florist", "hetlora", "lora_fair", "rbla")


@pytest.mark.parametrize("name", EVERY)
def test_a_factor_that_stays_at_home_is_refused_where_its_product_is_needed(name, monkeypatch):
    config = load(f"strategy={name} recipe.keep=[head,lora_b]")
    strategy = build(config.strategy, recipe=config.recipe)
    suited(build(config.strategy, recipe=load(f"strategy={name}").recipe), monkeypatch)
    if name in PRODUCTS:
        with pytest.raises(ConfigError, match="recipe.keep must leave them out, got lora_b; use strategy=fedsa_lora"):
            strategy.init(adapter(0))
    else:
        one_round(strategy, adapter(0), crowd(max(3, fewest(strategy))))


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
    mixed[0].metrics["steps"] = 9  # the sums hold no metrics
    total = {n: (adapter(1)[n] + 3 * adapter(2)[n]) / 4 for n in SHAPES}
    same(one_round(strategy, adapter(0), mixed), one_round(strategy, adapter(0), [update(0, total, 4)]))


def test_what_works_on_factors_says_so_before_anybody_trains_where_there_are_none(strategy):
    start = {HEAD: torch.zeros(2, 3)}
    sent = [update(i, {HEAD: torch.ones(2, 3)}) for i in range(max(2, fewest(strategy)))]
    try:
        state = strategy.init(start)
    except ConfigError as error:
        assert re.search(r"choose method=\S+( method=\S+)? or strategy=fedavg$", str(error))
    else:
        assert list(strategy.view(strategy.apply(state, 1, sent))) == [HEAD]


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
        admit(update(4, values), adapter(0), ClientInfo(4, 10))


INFO = ClientInfo(1, 10)


def test_the_gate_lets_a_good_update_pass_unchanged():
    good = update(1, adapter(1))
    assert admit(good, adapter(0), INFO) is good


@pytest.mark.parametrize("examples", [0, 9, 10**30])
def test_the_gate_wants_the_count_of_the_roll_call(examples):
    with pytest.raises(Refused, match="client 1: an update must be of the 10 images of the roll call"):
        admit(update(1, adapter(1), examples), adapter(0), INFO)


@pytest.mark.parametrize("metrics", [{"loss": math.nan}, {"seconds": math.inf}, {"steps": -1}, {"steps": 0}, {"steps": 1e-30}], ids=str)
def test_the_gate_wants_metrics_that_can_be(metrics):
    good = update(1, adapter(1))
    with pytest.raises(Refused, match="client 1: (metrics must be finite|an update needs at least 1 step)"):
        admit(good._replace(metrics=good.metrics | metrics), adapter(0), INFO)


def test_the_gate_wants_exactly_the_groups_that_were_asked():
    good = update(1, {name: tensor for name, tensor in adapter(1).items() if name != A})
    assert admit(good, part(adapter(0), ("lora_b", "head", "patch_embed")), INFO) is good  # a group that the method has not is no lack
    with pytest.raises(Refused, match=f"client 1: .*'{A}' is missing"):
        admit(good, adapter(0), INFO)
    with pytest.raises(Refused, match=f"client 1: .*'{B}' is unexpected"):
        admit(good, part(adapter(0), ("head",)), INFO)


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
    watch = Watch(few=True)
    for client, (examples, correct) in enumerate([(1, 1.0), (3, 0.0)]):
        own = {"own_loss": 1.0, "own_correct": correct, "own_examples": float(examples)}
        one = update(client, adapter(client + 1), examples)
        watch.see(adapter(0), one._replace(metrics=one.metrics | own))
    row = history_row(1, watch, [Evaluation(0, 2.0, 1, 1), Evaluation(1, 6.0, 1, 3)], [], 9.0)
    assert (row["accuracy"], row["loss"], row["train_loss"], row["train_seconds"]) == (0.5, 2.0, 1.0, 1.0)
    assert row["accuracy_p10"] == pytest.approx(1 / 3 + 0.1 * (1 - 1 / 3))  # a tenth of the way from the worst to the best
    assert row["personal"] == {"accuracy": 0.25, "accuracy_p10": pytest.approx(0.1), "loss": 0.5}
    assert row["diagnostics"]["modules"] == 1


def test_a_large_round_keeps_rows_and_no_updates():
    watch = Watch(few=False)
    watch.see(adapter(0), update(0, adapter(1), 1))
    assert not watch.kept and "diagnostics" not in history_row(1, watch, [], [], 1.0)


def test_the_ratio_counts_both_ways():
    sizes = {"train down": {"total": 30, "messages": 1}, "train up": {"total": 20, "header": 5, "envelope": 10, "messages": 1}}
    row = {"train_seconds": 1.0, "cohort": [0], "bytes": sizes}
    assert totals([row, row], full_bytes=90)["ratio_to_full_fedavg"] == pytest.approx((30 + 20) / 200)


def test_updates_are_read_one_at_a_time_and_to_the_end(strategy):
    came = []

    def stream():
        for one in crowd(number):
            came.append(one.client)
            yield one

    number = max(3, fewest(strategy))
    strategy.apply(strategy.init(adapter(0)), 1, stream())
    assert came == list(range(number))


def test_a_strategy_says_beforehand_how_many_clients_a_round_must_have(strategy):
    assert strategy.fewest == fewest(strategy)


def test_too_few_clients_for_a_rule_are_refused_before_anybody_trains():
    config = load("strategy=krum strategy.attackers=2 fraction=0.5")
    strategy = build(config.strategy, recipe=config.recipe)
    enough(strategy, config, 14)
    with pytest.raises(ConfigError, match="krum needs at least 7 clients in a round, got 6; raise clients or fraction"):
        enough(strategy, config, 12)


def test_a_strategy_of_one_rank_refuses_others_by_name_and_tells_which_take_them():
    config = load("strategy=fedavg method.rank=4")
    crowd = [ClientInfo(0, 10, rank=4), ClientInfo(1, 10, rank=4), ClientInfo(2, 10, rank=2)]
    strategy = build(config.strategy, recipe=config.recipe)
    one_rank(strategy, config, crowd[:2])
    one_rank(strategy._replace(ranks=True), config, crowd)
    with pytest.raises(ConfigError) as caught:
        one_rank(strategy, config, crowd)
    says = "fedavg gives all clients one rank, but client 2 has rank 2 and the run 4; take its own rank away, or use strategy="
    line, _, names = str(caught.value).partition(says)
    assert not line and set(names.split("|")) == {"ffa_lora", "flexlora", "flora", "florist", "hetlora", "rbla"}
    for method in ("lora_sb", "ravan"):
        lower = ClientInfo(1, 10, rank=1)
        with pytest.raises(ConfigError, match=f"{method} has one rank for all, but client 1 has rank 1 .*method=lora_patch or method=melo$"):
            one_rank(strategy._replace(ranks=True), load(f"method={method}"), [lower])
    one_rank(strategy, load("method=full"), [ClientInfo(0, 10)])
    for method, claim in (("melo", 5), ("melo", 0), ("melo", "2"), ("melo", None), ("full", 2)):
        with pytest.raises(ConfigError, match="client 3 must have a rank of at most the run's"):
            one_rank(strategy._replace(ranks=True), load(f"method={method}"), [ClientInfo(3, 10, rank=claim)])


def test_a_strategy_that_takes_ranks_gives_each_client_its_own(strategy):
    state = strategy.init(adapter(0))
    given = {rank: strategy.ask(state, 1, ClientInfo(0, 10, rank=rank))[1] for rank in (1, 2, None)}
    rows = {rank: len(adapter[A]) for rank, adapter in given.items() if A in adapter}  # none where all stays at home
    assert rows in ({}, {1: 1 if strategy.ranks else 2, 2: 2, None: 2})


def test_strategies_live_one_to_a_file():
    assert {Path(load(f"strategy={name}").strategy["_target_"].replace(".", "/")).parts[1] for name in EVERY} == set(EVERY)
