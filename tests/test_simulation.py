"""The real path equals the plain loop, tensor for tensor; runs repeat; the ledger tells the truth."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import first
from PIL import Image

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from clients import local
from clients.client_app import app as client_app
from fl import keys, seal_key
from fl.adapter import group, read
from fl.adapter import load as load_adapter
from fl.config import ConfigError, load
from fl.journal import Journal
from fl.provenance import ROOT
from fl.randomness import generator
from fl.wire.ledger import ENVELOPE, HEADER
from fl.wire.records import to_content
from simulations import cost, inprocess, launch, loop
from simulations.launch import engine
from strategies.exchange import RunFailed, exchange
from strategies.rollcall import RollCallError
from strategies.server_app import app as server_app

SMALL = "codec=float32 data.train=120 data.test=60 rounds=2 recipe.batch=16"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A key and a backbone that is made at once: the machinery is under test, not the accuracy."""
    home = tmp_path_factory.mktemp("home")
    keys.create(home / "key")
    return home


def settings(home: Path, out: Path, *more: str) -> str:
    model = "model=vit_tiny model.name=vit_tiny_patch16_224 model.image=32 model.patch=8 model.weights=none +model.embed_dim=32 +model.depth=2 +model.num_heads=2"
    if not (out / "seal.key").expanduser().exists():
        seal_key.create(out / "seal.key")  # one for each place, since it steps when a run ends
    return " ".join([SMALL, model, f"key={home / 'key'} seal_key={out / 'seal.key'} output={out} state={out / 'state'}", *more])


def by_loop(home: Path, out: Path, *more: str, train: loop.Train = local.train) -> tuple[dict, dict]:
    config = load(settings(home, out, "clients=3", *more))
    journal = Journal(config, "loop")
    return loop.run(config, journal, train), load_adapter(journal.folder / "adapter.safetensors")


def by_flower(home: Path, out: Path, *more: str) -> tuple[dict, dict]:
    inprocess.run(server_app, client_app, 3, settings(home, out, *more))
    return result(out)


def result(out: Path) -> tuple[dict, dict]:
    folder = max(out.glob("demo-*"), key=lambda p: p.name)
    return json.loads((folder / "summary.json").read_text()), load_adapter(folder / "adapter.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "more",
    first(5, ["", "partition=dirichlet fraction=0.5 recipe.augment=true", "method=lora_sb strategy=fed_sb", "method=full start=public", "strategy=flexlora +nodes.1.rank=2 +nodes.2.rank=1",
     "method=melo start=public", "method=linear", "recipe.mu=0.1 recipe.optimizer=sgd", "step=plain", "strategy=rolora", "method=ravan", "strategy=ffa_lora +nodes.0.rank=1 +nodes.2.rank=2 step=plain"]),
)
def test_flower_equals_the_plain_loop_tensor_for_tensor(home, tmp_path, more):
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path, more), by_flower(home, tmp_path, more)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"] and ours["loss"] == theirs["loss"]


def test_the_launcher_runs_the_same_apps_in_process_when_told_to(home, tmp_path, capsys):
    words = shlex.split(settings(home, tmp_path, "engine=inprocess"))
    assert launch.main(["--clients", "3", *words]) == 0
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path), result(tmp_path)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"]
    capsys.readouterr()
    assert launch.main(["--clients", "3", *words, "+nodes.1.key=/missing"]) == 4 and "client 1" in capsys.readouterr().err


@pytest.mark.parametrize("more", first(1, ["", "recipe.augment=true", "method=full", "method=ravan", "method=lora_sb"]))
def test_a_federation_of_lean_steps_is_one_of_plain_steps_to_rounding(home, tmp_path, more):
    sgd = f"precision=float32 recipe.optimizer=sgd recipe.momentum=0 {more}"
    (_, lean), (_, plain), (_, start) = (by_loop(home, tmp_path / n, sgd, c) for n, c in (("a", ""), ("b", "step=plain"), ("c", "recipe.lr={lora_a:0,lora_b:0,lora_r:0,head:0,patch_embed:0,backbone:0}")))
    moved = max(float((plain[n] - start[n]).abs().max()) for n in plain)
    assert max(float((lean[n] - plain[n]).abs().max()) for n in plain) < 1e-4 * moved


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(home, tmp_path):
    (_, one), (_, two), (_, other) = by_loop(home, tmp_path), by_loop(home, tmp_path / "b"), by_loop(home, tmp_path / "c", "seed=1")
    assert equal(one, two) and not equal(one, other)


def test_a_keyed_start_on_encrypted_images_is_a_public_start_on_plain_ones(home, tmp_path):
    (_, keyed), (_, plain) = by_loop(home, tmp_path), by_loop(home, tmp_path / "b", "cipher=plain start=public")
    (_, public), (_, start) = by_loop(home, tmp_path / "c", "start=public"), by_loop(home, tmp_path / "d", "recipe.lr={lora_a:0,lora_b:0,head:0,patch_embed:0}")
    moved = max(float((plain[n] - start[n]).abs().max()) for n in plain)
    apart = max(float((keyed[n] - plain[n]).abs().max()) for n in plain)
    assert apart < 1e-3 * moved
    assert max(float((public[n] - plain[n]).abs().max()) for n in plain) > 0.1 * moved


def test_the_ledger_counts_every_byte_by_group(home, tmp_path, monkeypatch):
    weighed: list[int] = []  # every message that crosses the grid, either way
    push, pull = inprocess.InProcessGrid.push_messages, inprocess.InProcessGrid.pull_messages

    def seen(messages):
        weighed.extend(sum(len(part.deflate()) for part in get_all_nested_objects(m).values()) for m in messages)
        return messages

    monkeypatch.setattr(inprocess.InProcessGrid, "push_messages", lambda self, messages: push(self, seen(messages)))
    monkeypatch.setattr(inprocess.InProcessGrid, "pull_messages", lambda self, ids: seen(pull(self, ids)))
    summary, adapter = by_flower(home, tmp_path)
    sizes = summary["bytes"]["train up"]
    assert sizes["messages"] == 2 * 3
    assert sum(total["total"] for total in summary["bytes"].values()) == sum(weighed)
    assert sizes["total"] - sizes[ENVELOPE] - sizes[HEADER] == 6 * sum(4 * t.numel() for t in adapter.values())
    assert {"lora_a", "lora_b", "patch_embed", "head"} < set(sizes)


def test_the_full_model_is_priced_as_the_method_full_measures_it(home, tmp_path):
    small, _ = by_flower(home, tmp_path)
    full, _ = by_flower(home, tmp_path / "full", "method=full start=public")
    measured = full["bytes_per_client_round"]["up"]
    assert small["full_model_message_bytes"] == pytest.approx(measured, rel=1e-3)
    assert full["ratio_to_full_fedavg"] == pytest.approx(1, rel=1e-2)
    halves, _ = by_flower(home, tmp_path / "halves", "strategy=rolora")
    assert halves["full_model_message_bytes"] == pytest.approx(small["full_model_message_bytes"], abs=10)


class Slow(inprocess.InProcessGrid):
    """Clients that take a while, one after another."""

    def _work(self, message):
        time.sleep(0.2)
        return super()._work(message)


class Backwards(inprocess.InProcessGrid):
    """Replies that come last first, and each of them twice."""

    def pull_messages(self, ids):
        replies = [reply for name in list(ids) for reply in super(Backwards, self).pull_messages([name])]
        return [reply for reply in reversed(replies) for _ in range(2)]


class Pausing(inprocess.InProcessGrid):
    """No reply at every second look."""

    looks = 0

    def pull_messages(self, ids):
        self.looks += 1
        return super().pull_messages(ids) if self.looks % 2 else []


def echoes(kind):
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(message.content, reply_to=message)

    grid = kind(app, 5, {})
    return grid, [Message(to_content({}), dst_node_id=n, message_type="train") for n in grid.get_node_ids()]


def test_replies_come_out_in_the_order_of_the_questions_and_once():
    grid, messages = echoes(Backwards)
    number = {node: i for i, node in enumerate(grid.get_node_ids())}
    assert [number[r.metadata.src_node_id] for r in exchange(grid, 5, messages, number)] == [0, 1, 2, 3, 4]


def test_clients_that_wait_for_their_turn_are_not_late():
    grid, messages = echoes(Slow)
    assert len(list(exchange(grid, 0.5, messages, {}))) == 5


def test_the_time_in_which_an_answer_is_worked_on_is_no_silence():
    grid, messages = echoes(Pausing)
    came = 0
    for _ in exchange(grid, 0.2, messages, {}):
        came += 1
        time.sleep(0.3)
    assert came == 5


def test_a_run_leaves_its_record_and_no_secret(home, tmp_path):
    by_flower(home, tmp_path)
    (folder,) = tmp_path.glob("demo-*")
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.yaml", "environment.json", "rounds.jsonl", "record.jsonl", "summary.json", "adapter.safetensors", "curve.svg", "preview.png", "split.json", "classes.json", "command.json", "checkpoints"}
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
    secret = (home / "key").read_bytes()
    assert not any(secret in p.read_bytes() or secret.hex().encode() in p.read_bytes() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("method", ["lora_patch", "full"])
def test_the_permuted_patch_embedding_never_leaves(home, tmp_path, method):
    def update(*more: str):
        config = load(settings(home, tmp_path, "clients=3", f"method={method} recipe.optimizer=sgd recipe.momentum=0 recipe.clip=0", *more))
        client = local.open_client(config, 0, 3)
        return client, local.train(client, 1, config.recipe, client.bench.start)[0]["patch_embed.proj.weight"]

    (client, keyed), (_, plain) = update(), update("cipher=plain start=public")
    assert float((keyed - plain).norm()) < 1e-3 * float(plain.norm())
    assert float((client.cipher.absorb(keyed) - plain).norm()) > 0.3 * float(plain.norm())


@pytest.mark.parametrize("groups", [("lora_b", "head"), ("lora_a", "patch_embed"), ("patch_embed",)])
def test_a_client_trains_and_returns_the_groups_that_it_is_asked_for(home, tmp_path, groups):
    client = local.open_client(load(settings(home, tmp_path, "clients=3")), 0, 3)
    start = {n: t + 0.1 * torch.randn(t.shape, generator=generator(0, n)) for n, t in client.bench.start.items()}  # no zeros: all have a gradient
    update, _, _ = local.train(client, 1, replace(client.config.recipe, groups=groups), start)
    assert set(update) == {n for n in start if group(n) in groups} and all(t.any() for t in update.values())
    left = local._release(client, read(client.bench.model))  # in plain order, as it came
    assert {n for n in start if torch.equal(left[n], start[n])} == {n for n in start if group(n) not in groups}
    whole, _, _ = local.train(client, 1, client.config.recipe, start)
    assert set(whole) == set(start)


def test_the_preview_does_not_give_the_key(home, tmp_path):
    by_loop(home, tmp_path)
    client = local.open_client(load(settings(home, tmp_path, "clients=3")), 0, 3)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "loop" / "preview.png")))[::3, ::3].permute(2, 0, 1)
    plain, shown = (torch.stack(sheet[:, top : top + 32].split(32, dim=2)) for top in (0, 32))
    assert torch.equal(plain, client.plain.images[:8])
    assert not torch.equal(shown, client.cipher.encrypt(plain))


def test_one_client_with_another_key_is_named_before_training(home, tmp_path):
    keys.create(tmp_path / "other")
    with pytest.raises(RollCallError, match="client 2 holds another key"):
        by_flower(home, tmp_path, f"+nodes.2.key={tmp_path / 'other'}")
    assert not list(tmp_path.glob("demo-*/adapter.safetensors"))


@pytest.mark.parametrize("strategy", ["flexlora", "florist", "ffa_lora", "hetlora", "rbla"])
def test_clients_of_ranks_4_2_and_1_send_what_they_hold_and_make_one_model(home, tmp_path, strategy):
    (ours, adapter) = by_loop(home, tmp_path, f"strategy={strategy} +nodes.1.rank=2 +nodes.2.rank=1")
    rows = [json.loads(line) for line in (tmp_path / "loop" / "rounds.jsonl").read_text().splitlines()]
    assert ours["ranks"] == [1, 2, 4] and adapter["blocks.0.attn.qkv.q.lora_a.weight"].shape == (4, 32)
    values = 4 * 32 * (4 + 2 + 1)  # of B alone; of A as many
    for row in rows:
        up, down = row["bytes"]["train up"], row["bytes"]["train down"]
        assert up["lora_b"] == down["lora_a"] == down["lora_b"] == 4 * values and up.get("lora_a", up["lora_b"]) == up["lora_b"]
        assert row["diagnostics"]["modules"] == 4


@pytest.mark.slow
def test_a_rank_is_a_nodes_own_setting_and_one_that_the_strategy_cannot_use_ends_the_run_before_training(home, tmp_path):
    says = "fedavg gives all clients one rank, but client 1 has rank 2 and the run 4"
    with pytest.raises(ConfigError, match=says):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path), {1: {"rank": 2}})
    with pytest.raises(ConfigError, match=says):
        by_loop(home, tmp_path, "+nodes.1.rank=2")
    with pytest.raises(RunFailed, match="client 1: method.rank is the run's largest rank, got 4 and a client's rank=9"):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path), {1: {"rank": 9}})
    assert not list(tmp_path.glob("*/rounds.jsonl"))


def test_one_client_with_another_backbone_is_named_before_training(home, tmp_path):
    client = local.open_client(load(settings(home, tmp_path, "method=full start=public")), 0, 3)
    torch.save({n: t + 0.01 for n, t in client.bench.model.state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(RollCallError, match="client 1 has another backbone"):
        by_flower(home, tmp_path, f"+nodes.1.weights={tmp_path / 'other.pt'}")


def test_a_client_that_cannot_work_is_named_with_its_reason(home, tmp_path):
    """In a simulation all is one person's, so the path is told, too; what a deployment tells is in test_secrets.py."""
    with pytest.raises(RunFailed, match=f"client 1: key file {tmp_path / 'none'} is missing"):
        by_flower(home, tmp_path, f"+nodes.1.key={tmp_path / 'none'}")


def test_a_node_that_does_not_know_its_place_is_told_how(home, tmp_path):
    with pytest.raises(RunFailed, match="--node-config"):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path), {1: {"partition-id": 3}})


def test_two_nodes_with_one_place_are_named(home, tmp_path):
    with pytest.raises(RollCallError, match="two nodes are client 0"):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path), {1: {"partition-id": 0}})


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda facts: facts.pop("correct"), "client 0: an evaluation must hold"),
        (lambda facts: facts.update(correct=10**6), "client 0: an evaluation must be of its"),
        (lambda facts: facts.update(loss=float("nan")), "with a loss of 0 to 1e\\+06 an image"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(home, tmp_path, monkeypatch, spoil, says):
    def spoilt(client, received, score=local.score):
        facts = score(client, received)._asdict()
        spoil(facts)
        return SimpleNamespace(_asdict=lambda: facts)

    monkeypatch.setattr(local, "score", spoilt)
    with pytest.raises(RunFailed, match=says):
        by_flower(home, tmp_path)


def test_a_client_that_does_not_answer_is_named(home, tmp_path, monkeypatch):
    pull = inprocess.InProcessGrid.pull_messages

    def deaf(self, ids):
        return [r for r in pull(self, ids) if r.metadata.message_type != "train" or r.metadata.src_node_id != 1002]

    monkeypatch.setattr(inprocess.InProcessGrid, "pull_messages", deaf)
    with pytest.raises(RunFailed, match=r"quorum lost: round 1 needs updates of 3 of 3 clients, got 2; client 2: it did not answer within 1 s.*\(silent\)"):
        by_flower(home, tmp_path, "timeout=1")


def test_a_message_that_the_engine_refuses_ends_the_run(home, tmp_path, monkeypatch):
    push = inprocess.InProcessGrid.push_messages
    def refusing(self, messages):
        names = list(push(self, messages))
        return names[1:] if messages[0].metadata.message_type == "train" else names

    monkeypatch.setattr(inprocess.InProcessGrid, "push_messages", refusing)
    with pytest.raises(RunFailed, match=r"client 0: the engine must take every message, but refused this one.*\(lost\)"):
        by_flower(home, tmp_path)


def test_a_run_whose_number_of_clients_differs_says_how_to_get_it(home, tmp_path):
    with pytest.raises(RollCallError, match="num-supernodes=5"):
        by_flower(home, tmp_path, "clients=5")


@pytest.mark.slow
def test_flwr_run_on_ray_equals_the_loop_with_one_worker_and_with_two(home, tmp_path):
    _, adapter = by_loop(home, tmp_path)
    with engine() as own:
        for workers in (1, 2):
            out = tmp_path / f"ray{workers}"
            assert own.run(3, workers, settings(home, out).split())
            assert equal(adapter, result(out)[1])


@pytest.mark.slow
def test_a_failed_run_is_a_failure_and_a_bad_override_is_one_line(home, tmp_path, capfd):
    with engine() as own:
        assert not own.run(2, 1, ["rounds=0"])  # past the launcher's own check
        assert not own.run(2, 2, settings(home, tmp_path, f"+nodes.1.key={tmp_path / 'none'}").split())
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("error:")]
    assert said[0] == "error: rounds: Input should be greater than or equal to 1, got 0 (exit status 2)"
    assert said[1].startswith(f"error: client 1: key file {tmp_path / 'none'} is missing")


@pytest.mark.slow
def test_an_engine_started_in_another_checkout_still_runs_this_code(home, tmp_path):
    other = tmp_path / "other"
    for room in ("fl", "clients", "strategies"):
        shutil.copytree(ROOT / room, other / room)
    (other / "clients" / "local.py").write_text("raise RuntimeError('code of another checkout')\n")
    with engine(started_in=other) as own:
        assert own.run(2, 1, settings(home, tmp_path / "out", "rounds=1").split())


@pytest.mark.slow
def test_the_demo_learns_and_the_keyed_start_helps(tmp_path):
    accuracy = {}
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_bytes(bytes(range(32)))  # with a public start the accuracy depends on the key
    for name in ("keyed", "melo"):
        config = load(f"experiment=demo/{name} clients=2 key={tmp_path / 'key'} model.weights={tmp_path} output={tmp_path}")
        accuracy[name] = loop.run(config, Journal(config, name))["accuracy"]
    assert accuracy["keyed"] > 0.8 and accuracy["keyed"] - accuracy["melo"] > 0.1


@pytest.mark.slow
def test_lora_patch_on_vit_base_sends_less_than_a_hundredth_of_the_full_model():
    config = load("model=vit_base")
    small, full = (cost.cost(config, method) for method in ("lora_patch", "full"))
    assert (small.parameters, small.entry.total - small.entry.sizes[ENVELOPE] - small.entry.sizes[HEADER]) == (745_738, 4 * 745_738)
    assert small.entry.total / full.entry.total <= 0.0088


def test_every_shipped_model_sends_less_than_a_hundredth_by_default(home, tmp_path):
    """A message of each, and a whole run of the smallest, both ways, the first round and its envelopes included."""
    for model in ("demo_vit", "vit_tiny"):
        config = load(f"model={model}")
        message, full = (cost.cost(config, method, road).entry.total for method, road in (("lora_patch", ""), ("full", "codec=float32")))
        assert message < 0.01 * full
    inprocess.run(server_app, client_app, 2, f"data.train=120 data.test=60 rounds=2 evaluate_every=2 model.weights=none key={home / 'key'} output={tmp_path} state={tmp_path / 'state'}")
    assert result(tmp_path)[0]["ratio_to_full_fedavg"] < 0.01


@pytest.mark.slow
def test_the_loop_needs_neither_flower_nor_ray():
    script = "import sys, simulations.loop, simulations.compare; assert not {'flwr', 'ray'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
