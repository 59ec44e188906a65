"""Parts of the model that stay at home: they train, they are not sent, and they survive the end of their process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import first
from test_simulation import by_flower, by_loop, equal, home, result, settings  # noqa: F401

from clients import holdings, local, workbench
from fl.adapter import PATCH_EMBED, group, move
from fl.adapter import load as load_adapter
from fl.config import load

STATEFUL = ["strategy=fedsa_lora", "strategy=fedsa_lora strategy.local_head=false", "strategy=local_only", "recipe.keep=[head]"]


def rows(out, run: str = "loop") -> list[dict]:
    return [json.loads(line) for line in (out / run / "rounds.jsonl").read_text().splitlines()]


def kept(out, run: str = "loop") -> dict:
    """Every tensor that the clients keep, by file and name."""
    files = sorted((out / "state" / run).rglob("*.safetensors"))
    return {f"{p.relative_to(out / 'state' / run)} {n}": t for p in files for n, t in load_adapter(p).items()}


@pytest.mark.parametrize("more", first(2, list([*STATEFUL, "strategy=fedsa_lora clients=3 fraction=0.6 rounds=3"])))
def test_flower_equals_the_plain_loop_with_parts_that_stay_at_home(home, tmp_path, more):
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path, more), by_flower(home, tmp_path, more)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"]
    run = result(tmp_path)[0]["run"]
    assert [r.get("personal") for r in rows(tmp_path)] == [r.get("personal") for r in rows(tmp_path, run)]
    assert kept(tmp_path) and equal(kept(tmp_path), kept(tmp_path, run))


@pytest.mark.parametrize("more", ["", "strategy=rolora"])
def test_where_nothing_stays_at_home_no_disk_is_touched(home, tmp_path, more):
    by_loop(home, tmp_path, more)
    by_flower(home, tmp_path, more)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("more", first(1, list(STATEFUL)))
def test_a_process_may_end_after_any_message(home, tmp_path, more):
    (_, whole), steady = by_loop(home, tmp_path / "a", more), rows(tmp_path / "a")
    began = []

    def in_a_new_process(client, *orders):
        began.append(client.index)
        local.SHELF.__init__()
        for cache in (local.open_client, holdings._source, holdings._split, workbench.workbench):
            cache.cache_clear()
        return local.train(local.open_client(client.config, client.index, client.of), *orders)

    _, pieces = by_loop(home, tmp_path / "b", more, train=in_a_new_process)
    assert began == [0, 1, 2] * 2
    assert equal(whole, pieces) and equal(kept(tmp_path / "a"), kept(tmp_path / "b"))
    assert [r["personal"] for r in steady] == [r["personal"] for r in rows(tmp_path / "b")]


def test_what_stays_at_home_does_not_travel_either_way(home, tmp_path):
    halves, sole, all_of_it = (by_flower(home, tmp_path / s, f"strategy={s}")[0]["bytes"] for s in ("fedsa_lora", "local_only", "fedavg"))
    for way in ("train up", "train down"):
        assert not {"lora_b", "head"} & set(halves[way]) and halves[way]["lora_a"] == all_of_it[way]["lora_a"]
        assert set(sole[way]) == {"header", "envelope", "total", "messages"} and sole[way]["messages"] == 6
    assert load_adapter(next((tmp_path / "fedsa_lora").glob("demo-*/adapter.safetensors"))).keys() == result(tmp_path / "fedavg")[1].keys()


def test_alone_is_each_client_by_itself_round_after_round(home, tmp_path):
    by_loop(home, tmp_path, "strategy=local_only", "rounds=3")
    config = load(settings(home, tmp_path, "clients=3 rounds=3"))
    for index in range(3):
        client = local.open_client(config, index, 3)
        model = client.bench.start
        for round in (1, 2, 3):
            recipe = replace(config.recipe, span=((round - 1) / 3, round / 3))
            model = move(model, local.train(client, round, recipe, model)[0])
        left = load_adapter(tmp_path / "state" / "loop" / f"client-{index:03}" / "personal-00003.safetensors")
        for name, tensor in model.items():
            torch.testing.assert_close(left[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_clients_own_model_is_what_is_scored(home, tmp_path):
    """Where nothing is shared the global model stays the guess that it was, and the personal ones learn."""
    more = "strategy=local_only method=linear data.train=600 rounds=4 recipe.epochs=3"
    by_loop(home, tmp_path, more)
    last = rows(tmp_path)[-1]
    assert last["personal"]["loss"] < 0.95 * last["loss"] and last["loss"] == rows(tmp_path)[0]["loss"]


@pytest.mark.slow
def test_the_patch_embedding_is_kept_in_plain_order(home, tmp_path):
    def left(out, *more: str) -> torch.Tensor:
        by_loop(home, out, "strategy=local_only", *more)
        return kept(out)[f"client-000/personal-00002.safetensors {PATCH_EMBED}"]

    start = local.open_client(load(settings(home, tmp_path, "clients=3")), 0, 3).bench.start[PATCH_EMBED]
    keyed, plain = left(tmp_path / "a"), left(tmp_path / "b", "cipher=plain start=public")
    assert float((keyed - start).norm()) < 0.3 * float(start.norm()) and float((keyed - plain).norm()) < 0.05 * float((plain - start).norm())


def test_a_round_that_is_repeated_gives_the_same_bytes(home, tmp_path):
    config = load(settings(home, tmp_path, "clients=3 strategy=fedsa_lora"))
    client, recipe = local.open_client(config, 1, 3), replace(config.recipe, keep=("lora_b", "head"))
    given = {n: t for n, t in client.bench.start.items() if group(n) not in recipe.keep}
    assert set(local.train(client, 1, recipe, given, False, "run")[0]) == set(given)
    once, again = (local.train(client, 2, recipe, given, False, "run")[0] for _ in range(2))
    other = local.train(client, 2, recipe, given, False, "other")[0]  # a run in which round 1 is missing
    assert equal(once, again) and not equal(once, other)


def test_a_node_keeps_its_state_where_its_own_settings_say(home, tmp_path):
    by_flower(home, tmp_path, "strategy=fedsa_lora", f"+nodes.1.state={tmp_path / 'own'}")
    assert [p.name for p in (tmp_path / "own").glob("*/*")] == ["client-001"]
    assert sorted(p.name for p in (tmp_path / "state").glob("*/*")) == ["client-000", "client-002"]
