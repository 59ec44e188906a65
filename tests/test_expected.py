"""What a client lets a server ask of it: what its own strategy would, whichever that is, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from test_simulation import home, settings  # noqa: F401

from clients import expected, link, local
from clients.client_app import app
from fl.adapter import apart, ride
from fl.config import CONF, build, load
from fl.randomness import generator
from fl.wire.coding import coding
from fl.wire.flat import WireError
from simulations import inprocess
from strategies import ClientInfo, Update, server_app
from strategies.catchup import Catchup
from strategies.downlink import Downlink
from strategies.plan import orders, scores_own
from strategies.talk import QuorumLost

STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
METHODS = {"fed_sb": "method=lora_sb"}


def opened(home, folder, *more: str, index: int = 0) -> local.Client:
    return local.open_client(load(settings(home, folder, "clients=5", "data.train=200", *more)), index, 5)


@pytest.mark.parametrize("codec", ["float32", pytest.param("int4_low_rank", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_an_honest_server_asks_is_what_every_client_expects(home, tmp_path, name, codec):
    """Four rounds of every strategy, its recipes and its messages, whole and as differences, with updates that move everything."""
    more = f"strategy={name}", METHODS.get(name, ""), f"codec={codec}", "rounds=4"
    client = opened(home, tmp_path, *more, index=3)
    config, start = client.config, client.bench.start
    strategy, wire = build(config.strategy, recipe=config.recipe), coding(config)
    state, downlink = strategy.init(start), Downlink(wire, Catchup(strategy), config.seed, start)
    for round in range(1, 5):
        updates = []
        for index in range(5):
            info = ClientInfo(index, client.holdings.train.size, client.shard.size, client.rank)
            recipe, given = orders(strategy, config, state, round, info)
            facts = {"recipe": recipe.to_json(), "scored": scores_own(config, round)}
            if index == client.index:
                assert expected.order(client, facts, round) == recipe
                arrives(client, downlink.messages(state, round - 1, index, given, facts), wire, "train", round)
            stream = generator(0, "moved", round, index)
            moved = {n: 0.01 * torch.randn(t.shape, generator=stream) for n, t in recipe.sent(given).items()}
            updates.append(Update(index, moved, info.examples, {"steps": 3.0, "loss": 1.0}))
        state = strategy.apply(state, round, updates)
        arrives(client, downlink.messages(state, round, client.index, strategy.view(state)), wire, "evaluate", round)


def arrives(client, messages, wire, kind: str, round: int) -> None:
    packed, facts = next(messages)
    expected.shaped(client, packed.shapes(), kind, round)
    received = link.arrived(client.drawer("law"), wire, packed, facts.get("link"), client.bench.start, kind, round)
    if kind == "train" and round == 1:
        expected.begun(client, received)


CHANGES = {
    "optimizer": "sgd", "lr": {"lora_a": 1.0, "lora_b": 1.0, "head": 1.0, "patch_embed": 1.0, "backbone": 1.0, "lora_r": 1.0}, "epochs": 2,
    "batch": 2, "deadline": 1e-9, "groups": ["head"], "keep": ["head"], "control": True, "mu": 0.5, "clip": 0.0, "weight_decay": 0.1,
    "momentum": 0.0, "warmup": 0.0, "cosine": False, "augment": True, "span": [0.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_a_recipe_that_differs_in_one_field_is_refused_by_its_name(home, tmp_path, field):
    client = opened(home, tmp_path, "rounds=4")
    own, _ = expected.asked(client, 2)
    facts = {"recipe": own.to_json(), "scored": scores_own(client.config, 2)}
    assert expected.order(client, facts, 2) == own
    changed = json.dumps(json.loads(own.to_json()) | {field: CHANGES[field]})
    with pytest.raises(WireError, match=rf"but its {field} differ"):
        expected.order(client, facts | {"recipe": changed}, 2)
    assert set(CHANGES) == set(json.loads(own.to_json())), "every field is tried"


def test_a_recipe_of_another_round_and_an_unasked_score_are_refused(home, tmp_path):
    client = opened(home, tmp_path, "rounds=4", "strategy=rolora", "personal=false")
    of_one = expected.asked(client, 1)[0]
    with pytest.raises(WireError, match="span, groups differ"):
        expected.order(client, {"recipe": of_one.to_json(), "scored": False}, 2)
    for scored in (True, None, 0, "false"):
        with pytest.raises(WireError, match="own model's score"):
            expected.order(client, {"recipe": of_one.to_json(), "scored": scored}, 1)


def shapes(adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.items()}


@pytest.mark.parametrize("strategy, taken", [("fedavg", False), ("fedex_lora", True)])
def test_the_frozen_weights_change_only_where_the_clients_own_strategy_changes_them(home, tmp_path, strategy, taken):
    client = opened(home, tmp_path, f"strategy={strategy}")
    start = client.bench.start
    a = next(name for name in start if "lora_a" in name)
    b = a.replace("lora_a", "lora_b")
    message = {**start, **ride("base", {f"0.{a}": torch.zeros(7, start[a].shape[1]), f"0.{b}": torch.zeros(len(start[b]), 7)})}
    if taken:
        expected.shaped(client, shapes(message), "train", 2)
        other = {**start, **ride("base", {"0.head.weight": start["head.weight"]})}
        with pytest.raises(WireError, match="of a module with factors"):
            expected.shaped(client, shapes(other), "train", 2)
    else:
        with pytest.raises(WireError, match="frozen weights must stay"):
            expected.shaped(client, shapes(message), "train", 2)


def test_control_variates_come_only_where_the_clients_own_strategy_makes_them(home, tmp_path):
    start = opened(home, tmp_path).bench.start
    message = shapes({**start, **ride("control", start)})
    expected.shaped(opened(home, tmp_path, "strategy=scaffold"), message, "train", 2)
    with pytest.raises(WireError, match="must be left out under this client's strategy"):
        expected.shaped(opened(home, tmp_path), message, "train", 2)
    with pytest.raises(WireError, match="got nothing"):
        expected.shaped(opened(home, tmp_path, "strategy=scaffold"), shapes(start), "train", 2)


def test_a_message_without_a_part_or_of_a_lower_rank_is_refused(home, tmp_path):
    client = opened(home, tmp_path)
    start = shapes(client.bench.start)
    a = next(name for name in start if "lora_a" in name)
    for change in ({k: v for k, v in start.items() if k != "head.bias"}, start | {a: (1, start[a][1])}):
        for kind in ("train", "evaluate"):
            with pytest.raises(WireError, match="under this client's strategy"):
                expected.shaped(client, change, kind, 2)


@pytest.mark.parametrize("strategy, codec", [("fedavg", "float32"), ("fedavg", "int4_low_rank"), ("ffa_lora", "int4_low_rank"), ("scaffold", "float32")])
def test_round_one_begins_at_the_start_and_a_crafted_head_is_refused(home, tmp_path, strategy, codec):
    """The histogram attack of an active server: a head that makes each class's gradient its count."""
    client = opened(home, tmp_path, f"strategy={strategy}", f"codec={codec}")
    _, given = expected.asked(client, 1)
    expected.begun(client, given)
    for name in [n for n in given if "head" in n]:
        crafted = {**given, name: given[name] + 1e-6}
        with pytest.raises(WireError, match="round 1 must begin at the start"):
            expected.begun(client, crafted)
    turned = {n: t * (100 if "lora_a" in n else 1) for n, t in given.items()}
    with pytest.raises(WireError, match="round 1 must begin at the start"):
        expected.begun(client, turned)


@pytest.mark.parametrize("lie", ["crafted head", "one step of SGD", "base under fedavg", "score"])
def test_a_lying_server_gets_no_update_and_a_line_that_says_why(home, tmp_path, monkeypatch, capsys, lie):
    """The attacks of a server that is not honest, through Flower's own apps: the client refuses, and the run ends."""
    real = Downlink.messages

    def messages(self, state, upto, client, adapter, facts={}):
        if "recipe" in facts:
            if lie == "crafted head":
                adapter = {**adapter, "head.bias": adapter["head.bias"] + 1}
            if lie == "one step of SGD":
                recipe = json.loads(facts["recipe"]) | {"optimizer": "sgd", "deadline": 1e-9}
                facts = {**facts, "recipe": json.dumps(recipe)}
            if lie == "base under fedavg":
                a = next(name for name in apart(adapter).own if "lora_a" in name)
                factors = {f"0.{a}": torch.ones(2, adapter[a].shape[1]), f"0.{a.replace('lora_a', 'lora_b')}": torch.ones(32, 2)}
                adapter, facts = {**adapter, **ride("base", factors)}, {**facts, "base": [0, upto]}
            if lie == "score":
                facts = {**facts, "scored": not facts["scored"]}
        yield from real(self, state, upto, client, adapter, facts)

    trained = []
    monkeypatch.setattr(Downlink, "messages", messages)
    monkeypatch.setattr(local, "train", lambda *a, **k: trained.append(1))
    with pytest.raises(QuorumLost):
        inprocess.run(server_app.app, app, 2, settings(home, tmp_path, "codec=float32"))
    assert not trained
    why = {"crafted head": "round 1 must begin", "one step of SGD": "its optimizer, deadline differ", "base under fedavg": "frozen weights", "score": "score"}
    assert why[lie] in capsys.readouterr().out
