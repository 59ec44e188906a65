"""Strategies that change the frozen base: they are exact, everybody catches up, and nothing is lost with a client's state."""

from __future__ import annotations

import shutil
from functools import reduce

import pytest
import torch
from test_aggregation import COUNTS, EXACT, MODULES, RANK, answers, drawn, made, products, turned
from test_personal import kept, rows
from conftest import first
from test_simulation import by_flower, by_loop, equal, home, result, settings  # noqa: F401

from clients import carried, holdings, local, workbench
from clients.client_app import app as client_app
from clients.state import Drawer
from fl.adapter import apart, digest, move, read, ride, write
from fl.base import follow, grow, is_dense, modules, names, numbered, product
from fl.config import build, load
from fl.lean import lean
from fl.learn import plain
from fl.models import WeightsError
from fl.models.lora import rebase
from fl.models.lora_patch import lora_patch
from fl.randomness import generator
from simulations import inprocess, loop
from strategies import ClientInfo, Update
from strategies.catchup import Catchup
from strategies.factors import at_rank
from strategies.grown import Grown, grown, lacking
from strategies.server_app import app as server_app

CHANGING = ["flora", "fedex_lora"]
MODULE = "blocks.0.attn.qkv.q"


def factored(seed: int, columns: int, wide: int = 17, high: int = 11, module: str = MODULE, size: float = 1.0) -> dict[str, torch.Tensor]:
    a, b, _ = names(module)
    stream = generator(seed, "factored", module)
    return {a: size * torch.randn(columns, wide, generator=stream), b: size * torch.randn(high, columns, generator=stream)}


def effective(strategy, state, a: str, b: str) -> torch.Tensor:
    """What stands beside W in the model, all but the scale."""
    own, _, change = apart(Catchup(strategy).whole(state, strategy.view(state)))
    return own[b] @ own[a] + (product(change, a.removesuffix(".lora_a.weight")).to(own[a].dtype) if change else 0)


# The algebra ----------------------------------------------------------------------------------------------------------


def test_a_change_is_factored_while_that_is_smaller_and_dense_from_then_on():
    """17 x 11 = 187 values dense, 28 for each column: six columns are 168, seven are 196."""
    parts = [factored(i, 2) for i in range(5)]
    whole, sum_ = {}, torch.zeros(11, 17, dtype=torch.float64)
    for i, part in enumerate(parts):
        before = digest(whole)
        grew = grow(whole, part)
        assert digest(whole) == before and list(part) == list(factored(i, 2))
        whole, sum_ = grew, sum_ + product(part, MODULE)
        assert is_dense(whole) == (i >= 3)
        torch.testing.assert_close(product(whole, MODULE), sum_, rtol=1e-6, atol=1e-6)
    assert set(whole) == {names(MODULE).dense} and modules(whole) == [MODULE]
    assert digest(follow({}, numbered(parts))) == digest(whole) == digest(follow(grow(parts[0], parts[1]), numbered(parts[2:])))
    assert grow({}, {}) == {} and digest(grow({}, parts[0])) == digest(grow(parts[0], {})) == digest(parts[0])


def test_the_server_gives_each_client_what_it_lacks_and_forgets_what_nobody_can_use():
    base, sums = Grown(), [torch.zeros(11, 17, dtype=torch.float64)]
    for round in range(1, 9):
        step = factored(round, 2)
        base = grown(base, round, step)
        sums.append(sums[-1] + product(step, MODULE))
        for since in range(round + 1):
            begins, steps = lacking(base, since)
            change = reduce(grow, steps, {})
            assert begins in (0, since) and (begins == since) == (round - since <= 3 or not since)
            found = product(change, MODULE) if change else torch.zeros(11, 17, dtype=torch.float64)
            torch.testing.assert_close(found, sums[round] - sums[begins], rtol=1e-5, atol=1e-5)
            assert sum(t.numel() for t in change.values()) <= 11 * 17
        assert len(base.steps) <= 3
    assert lacking(Grown(), 0) == (0, ({},)) and lacking(base, 99)[0] == 0


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CHANGING)
def test_the_effective_weight_is_the_mean_of_the_clients(name, dtype, within):
    """W + s B A, over three rounds that build on each other; s and W are common to both sides and cancel."""
    strategy = made(name)
    state = strategy.init({n: t.to(dtype) for n, t in drawn(0).items()})
    for round in (1, 2, 3):
        before = {a: effective(strategy, state, a, b) - state.adapter[b] @ state.adapter[a] for a, b in MODULES}
        updates = [Update(k, {n: t.to(dtype) for n, t in drawn(100 * round + k, 0.5).items()}, count, {}) for k, count in enumerate(COUNTS)]
        trained, weights = [move(state.adapter, u.adapter) for u in updates], [count / sum(COUNTS) for count in COUNTS]
        state = strategy.apply(state, round, iter(updates))
        for a, b in MODULES:
            expected = before[a] + products(trained, weights, a, b)
            assert float((effective(strategy, state, a, b) - expected).norm() / expected.norm()) < within
        dense = sum(p * t["head.weight"] for p, t in zip(weights, trained))
        torch.testing.assert_close(strategy.view(state)["head.weight"], dense, rtol=10 * within, atol=within)


def test_flora_is_exact_for_clients_of_different_ranks_without_a_column_too_many():
    strategy, ranks = made("flora"), (1, 3, 2, 3, 1)
    state = strategy.init(drawn(0))
    for round in (1, 2):
        before = {a: effective(strategy, state, a, b) - state.adapter[b] @ state.adapter[a] for a, b in MODULES}
        given = [strategy.ask(state, round, ClientInfo(k, n, rank=r))[1] for k, (n, r) in enumerate(zip(COUNTS, ranks))]
        steps = [at_rank(drawn(100 * round + k, 0.5), r) for k, r in enumerate(ranks)]
        weights = [count / sum(COUNTS) for count in COUNTS]
        trained = [move(g, s) for g, s in zip(given, steps)]
        state = strategy.apply(state, round, [Update(k, s, n, {}) for k, (s, n) in enumerate(zip(steps, COUNTS))])
        for a, b in MODULES:
            torch.testing.assert_close(effective(strategy, state, a, b), before[a] + products(trained, weights, a, b), **EXACT)
            assert state.adapter[a].shape == drawn(0)[a].shape
        torch.testing.assert_close(state.adapter["head.weight"], sum(p * t["head.weight"] for p, t in zip(weights, trained)), **EXACT)
    assert [len(state.base.steps), is_dense(state.base.whole)] == [0, True]  # ten columns of 28 values are more than 187


def test_the_residual_of_fedex_has_no_more_columns_than_its_rank():
    strategy = made("fedex_lora")
    updates, trained, weights = answers(strategy, strategy.init(drawn(0)), 1, counts=COUNTS[:2])
    (change,) = strategy.base(strategy.apply(strategy.init(drawn(0)), 1, updates), 0)[1]
    for a, b in MODULES:
        assert len(change[a]) == RANK == change[b].shape[1]
        means = [sum(p * t[n] for p, t in zip(weights, trained)) for n in (b, a)]
        torch.testing.assert_close(change[b] @ change[a], products(trained, weights, a, b) - means[0] @ means[1], **EXACT)
    alone = strategy.apply(strategy.init(drawn(0)), 1, updates[:1])
    assert strategy.base(alone, 0) == (0, ({},)) and strategy.base(alone, 1) == (1, ())


def test_flora_stacks_all_columns_and_draws_anew():
    strategy = made("flora")
    first = strategy.init(drawn(0))
    one, two = (strategy.apply(first, round, answers(strategy, first, 1, counts=COUNTS[:2])[0]) for round in (1, 2))
    a, b = MODULES[0]
    assert len(strategy.base(one, 0)[1][0][a]) == 2 * RANK and not one.adapter[b].any()
    assert float(one.adapter[a].abs().max()) <= one.adapter[a].shape[1] ** -0.5 and one.adapter[a].std() > 0
    again, other = (made("flora", seed=s).apply(first, 1, answers(strategy, first, 1)[0]).adapter for s in (0, 1))
    assert torch.equal(one.adapter[a], again[a]) and not torch.equal(one.adapter[a], two.adapter[a]) and not torch.equal(again[a], other[a])


@pytest.mark.parametrize("name", CHANGING)
def test_the_frame_of_a_clients_factors_does_not_matter(name):
    strategy = made(name)
    state = strategy.init(drawn(0))
    updates, _, _ = answers(strategy, state, 1)
    moved = [u._replace(adapter=turned(u.adapter, drawn(0), u.client + 1)) for u in updates]
    one, other = (strategy.apply(state, 1, sent) for sent in (updates, moved))
    for a, b in MODULES:
        torch.testing.assert_close(effective(strategy, one, a, b), effective(strategy, other, a, b), **EXACT)
    plain, turned_too = (made("fedavg").apply(drawn(0), 1, sent) for sent in (updates, moved))
    assert float((plain[b] @ plain[a] - turned_too[b] @ turned_too[a]).norm()) > 0.1 * float((plain[b] @ plain[a]).norm())


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["plain", "float32", "bfloat16"])
def test_a_rebased_model_computes_with_the_changed_weight_and_comes_back_bit_for_bit(tiny, forty, step):
    def forward(model):
        return plain(model) if step == "plain" else lean(model, step, "plain")

    model, other = tiny(lora_patch(2, 5.0)), tiny(lora_patch(2, 5.0))
    adapter = {n: t + 0.1 * torch.randn(t.shape, generator=generator(0, n)) for n, t in read(model).items()}
    write(model, adapter), write(other, adapter)
    change = factored(1, 3, 16, 16, size=0.1) | {names("blocks.1.attn.qkv.v").dense: 0.1 * torch.randn(16, 16, generator=generator(2))}
    with torch.no_grad():
        for module, at in ((MODULE, 0), ("blocks.1.attn.qkv.v", 2)):
            weight = other.get_submodule(module.rpartition(".")[0]).weight
            weight[16 * at : 16 * (at + 1)] += 2.5 * product(change, module).float()
        run, expected = forward(model), forward(other)(forty.images)
        pristine, state = run(forty.images), digest(model.state_dict())
        for _ in range(3):  # not one on top of the other
            rebase(model, change)
        torch.testing.assert_close(run(forty.images), expected, rtol=1e-5, atol=1e-5 if step != "bfloat16" else 1e-2)
        assert float((run(forty.images) - pristine).abs().max()) > 0.01
        rebased = digest(model.state_dict())
        rebase(model, {})
        assert torch.equal(run(forty.images), pristine) and digest(model.state_dict()) == state
        rebase(model, factored(5, 2, 16, 16)), rebase(model, change)
        assert digest(model.state_dict()) == rebased
    with pytest.raises(WeightsError, match="must be of modules with LoRA, got blocks.9.attn.qkv.q"):
        rebase(model, factored(1, 2, 16, 16, "blocks.9.attn.qkv.q"))


@pytest.mark.parametrize("name", CHANGING)
def test_what_a_run_leaves_rebuilds_the_model_that_the_clients_scored(home, tmp_path, name):
    config = load(settings(home, tmp_path, "clients=3 rounds=3", f"strategy={name} precision=float32"))
    _, left = by_loop(home, tmp_path, "rounds=3", f"strategy={name} precision=float32")
    client = local.open_client(config, 1, 3)
    model = build(config.model, classes=len(client.holdings.classes))
    build(config.method)(model, config.seed)
    own, _, change = apart(left)
    write(model, own)
    rebase(model, change)
    images = client.holdings.test.source.images[:20]
    with torch.no_grad():
        rebuilt = plain(model)(images)  # on plain pictures, without a key
        local.settle(client, ride("base", numbered([change])), "elsewhere", (0, 3))
        write(client.bench.model, local._absorb(client, own))
        torch.testing.assert_close(client.bench.forward(client.prepare(images)), rebuilt, rtol=1e-4, atol=1e-5)
        rebase(model, {})
        assert float((plain(model)(images) - rebuilt).abs().max()) > 1e-3


# The way to the clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", first(1, ["rounds=4 fraction=0.6", "", "rounds=3 step=plain evaluate_every=3 fraction=0.3", "method=melo start=public rounds=3"]))
@pytest.mark.parametrize("name", CHANGING)
def test_flower_equals_the_plain_loop_with_a_base_that_changes(home, tmp_path, name, more):
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path, f"strategy={name}", more), by_flower(home, tmp_path, f"strategy={name}", more)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"] and ours["loss"] == theirs["loss"]
    assert apart(adapter).base or (name == "fedex_lora" and "fraction=0.3" in more)  # one client alone leaves no residual
    run = result(tmp_path)[0]["run"]
    assert equal(kept(tmp_path), kept(tmp_path, run)) and [r.get("personal") for r in rows(tmp_path)] == [r.get("personal") for r in rows(tmp_path, run)]


@pytest.mark.parametrize("name", CHANGING)
def test_a_client_that_was_away_catches_up_exactly(home, tmp_path, name):
    """Two of three train in each round and only the last is evaluated; all then stand on the server's base, bit for bit."""
    _, left = by_loop(home, tmp_path, f"strategy={name} fraction=0.6 rounds=4 evaluate_every=4")
    change = apart(left).base
    for index in range(3):
        assert digest(Drawer(str(tmp_path / "state"), "loop", index).recall(carried.BASE, 4)[1]) == digest(change)


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["all", "one", "damage", "older"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_client_that_lost_its_base_says_so_and_is_sent_all_of_it(home, tmp_path, monkeypatch, name, lose):
    """By the loop and by Flower: the same bytes as a run in which nothing was lost, and the resent ones are counted."""
    (whole, steady) = by_loop(home, tmp_path / "a", f"strategy={name} rounds=4")
    settle, calls = local.settle, []

    def careless(client, received, run="", span=None):
        calls.append(client.index)
        folder = Drawer(client.config.state, run, client.index).folder
        if len(calls) == 13:  # three clients train and are evaluated, twice: round 3 begins
            files = sorted(folder.parent.rglob("base-*.safetensors"))
            assert [file.name for file in files] == 3 * ["base-00001.safetensors", "base-00002.safetensors"]
            if lose == "damage":
                for file in files[:2]:
                    file.write_bytes(b"damaged")
            elif lose == "older":
                files[1].unlink()
            else:
                for place in {file.parent for file in (files if lose == "all" else files[:1])}:
                    shutil.rmtree(place)
        return settle(client, received, run, span)

    monkeypatch.setattr(local, "settle", careless)
    for run, out in ((by_loop, tmp_path / "b"), (by_flower, tmp_path / "c")):
        calls.clear()
        summary, adapter = run(home, out, f"strategy={name} rounds=4")
        assert equal(adapter, steady) and len(calls) == 24 + (3 if lose == "all" else 1)
        extra = 3 if lose == "all" else 1
        assert summary["bytes"]["train down"]["messages"] == 12 + extra and summary["bytes"]["evaluate down"]["messages"] == 12
        assert summary["bytes"]["train down"]["base"] > whole["bytes"]["train down"].get("base", 0)


def test_a_client_that_never_catches_up_ends_the_run(home, tmp_path, monkeypatch):
    def never(client, received, run="", span=None):
        raise carried.Behind("no")

    monkeypatch.setattr(local, "settle", never)
    with pytest.raises(Exception, match="client 0: it says that it is behind, but has been sent the whole"):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path, "strategy=flora"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_a_process_may_end_after_any_message_and_clients_may_take_turns(home, tmp_path, name, monkeypatch):
    (_, whole), steady = by_loop(home, tmp_path / "a", f"strategy={name} rounds=3"), rows(tmp_path / "a")
    settle = local.settle
    known: list = []

    def anew(client, received, run="", span=None):
        """In a new process, in which another client, on a base of another round, has just been at work."""
        local.SHELF.__init__()
        for cache in (local.open_client, holdings._source, holdings._split, workbench.workbench):
            cache.cache_clear()
        rebase(client.bench.model, known[-1] if known else {})
        rest = settle(client, received, run, span)
        known.append(follow({}, apart(received).base))
        return rest

    monkeypatch.setattr(local, "settle", anew)
    _, pieces = by_loop(home, tmp_path / "b", f"strategy={name} rounds=3")
    assert equal(whole, pieces) and equal(kept(tmp_path / "a"), kept(tmp_path / "b"))
    assert [(r["loss"], r["personal"]) for r in steady] == [(r["loss"], r["personal"]) for r in rows(tmp_path / "b")]


def test_the_bases_bytes_are_counted_apart(home, tmp_path):
    """FLoRA, three clients of rank 4, width 32, four modules: 12 columns of 64 values are 3,072 bytes a module, a matrix 4,096."""
    summary, _ = by_flower(home, tmp_path, "strategy=flora rounds=2")
    found = [r["bytes"] for r in rows(tmp_path, result(tmp_path)[0]["run"])]
    assert [r["evaluate down"]["base"] for r in found] == [3 * 4 * 3072] * 2 and all("base" not in r["train down"] for r in found)
    _, plain = by_flower(home, tmp_path / "plain", "strategy=fedavg")
    assert summary["bytes"]["train up"]["lora_a"] == 6 * sum(4 * t.numel() for n, t in plain.items() if "lora_a" in n)


def test_flora_runs_with_a_client_of_a_lower_rank(home, tmp_path):
    more = "strategy=flora +nodes.1.rank=2 rounds=3"
    (ours, adapter), (_, same) = by_loop(home, tmp_path, more), by_flower(home, tmp_path, more)
    assert equal(adapter, same) and ours["bytes"]["train up"]["lora_a"] == 3 * (4 + 2 + 4) * 4 * 32 * 4


def test_one_clients_model_becomes_the_global_one_in_function(home, tmp_path):
    """One client in the only round: its own score after training is that of the global model on its shard."""
    for name in CHANGING:
        config = load(settings(home, tmp_path, f"clients=1 rounds=1 strategy={name} precision=float32"))
        summary = loop.run(config, loop.Journal(config, f"one-{name}"))
        row = rows(tmp_path, f"one-{name}")[0]
        assert summary["loss"] == pytest.approx(row["personal"]["loss"], rel=1e-5) and row["accuracy"] == row["personal"]["accuracy"]


def test_messages_of_other_strategies_pass_as_they_are():
    strategy, given = made("fedavg"), drawn(0)
    ((message, facts),) = Catchup(strategy).messages(given, 3, 0, given, {"round": 4})
    assert message is given and facts == {"round": 4} and Catchup(strategy).whole(given, given) is given


def test_clients_that_lack_the_same_are_sent_one_and_the_same_message():
    strategy = made("flora")
    state = strategy.apply(strategy.init(drawn(0)), 1, answers(strategy, strategy.init(drawn(0)), 1)[0])
    catchup = Catchup(strategy)
    (one, facts), (two, _) = (next(catchup.messages(state, 1, k, state.adapter)) for k in (0, 1))
    assert one is two and facts == {"base": [0, 1]}
    (again, facts) = next(catchup.messages(state, 1, 0, state.adapter))
    assert facts == {"base": [1, 1]} and set(again) == set(state.adapter)
    assert set(ride("base", numbered(strategy.base(state, 0)[1]))) == set(one) - set(state.adapter)
