"""A broken client costs a run its own update and no more: each fault on the scripted clients of the audit, and on real ones."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import first
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from test_simulation import by_flower, home, settings  # noqa: F401

from clients import expected, failure, gate, local
from clients.client_app import app as client_app
from fl.config import load
from fl.recipe import Recipe
from fl.wire.flat import Packed, WireError, pack
from fl.wire.float32 import float32
from fl.wire.records import TooLarge, facts_of, packed_of, to_content
from simulations import inprocess, launch, processes
from simulations.audit import faults
from simulations.audit.broken import FAULTS
from simulations.launch import engine
from strategies.flower import answer_of
from strategies.plan import scores_own
from strategies.rollcall import RollCallError
from strategies.talk import QuorumLost, RunFailed

CODE = {
    "one NaN": "non_finite", "one infinity": "non_finite", "wrong shape": "layout", "shape that broadcasts, (1, 1)": "layout",
    "float64 in the place of float32": "schema", "an extra array": "layout", "a missing array": "layout",
    "update a million times too long": "norm", "weight 1e15": "examples", "weight 0": "examples", "weight -500": "examples",
    "weight NaN": "schema", "it raises an exception": "client_error", "it is silent": "silent",
    "its reply of round 1, again and again": "stale", "all are silent in round 2": "silent",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(logging.NOTSET)


@pytest.mark.parametrize("fault", first(8, [f for f in FAULTS if f.name != "zero update"]), ids=lambda f: f.name)
def test_a_fault_is_named_and_the_model_is_what_the_others_make_of_it(fault):
    says, off = faults.beside(faults.ours, fault)
    assert off == 0
    assert says.endswith(CODE[fault.name]) if fault.name in CODE else says == "completes"


@pytest.mark.slow
@pytest.mark.parametrize("name, says", [("one NaN", "completes"), ("an extra array", "the run fails"), ("weight 1e15", "completes"), ("all are silent in round 2", "1 round lost")])
def test_flowers_own_fedavg_does_what_the_table_says_of_it(name, says):
    line = faults.measure(next(f for f in FAULTS if f.name == name))
    assert says in line.stock and (line.stock_off is None or not line.stock_off < 0.01) and line.ours_off == 0


def test_a_record_of_what_was_refused_is_kept_and_names_no_path(home, tmp_path, monkeypatch, capsys):
    real = local.train

    def broken(client, round, *more):
        if client.index == 1 and round == 1:
            raise RuntimeError(f"{tmp_path}/pictures/7.png")
        if client.index == 2 and round == 2:
            raise FileNotFoundError(2, "No such file or directory", f"{tmp_path}/Mary Smith (1970).png")
        return real(client, round, *more)

    monkeypatch.setattr(local, "train", broken)
    monkeypatch.setattr(failure, "simulated", lambda: False)
    summary, _ = by_flower(home, tmp_path, "quorum=0.6 timeout=5")
    rows = [json.loads(line) for line in next(tmp_path.glob("demo-*/rounds.jsonl")).read_text().splitlines()]
    assert [[(r["client"], r["code"]) for r in row["refused"]] for row in rows] == [[(1, "client_error")], [(2, "client_error")]]
    assert rows[0]["refused"][0]["reason"] == "a fault inside; its log says why" and [row["cohort"] for row in rows] == [[0, 2], [0, 1]]
    assert rows[1]["refused"][0]["reason"] == "its files: output: No such file or directory; its log says why" and summary["refused"] == {"client_error": 2}
    said = capsys.readouterr().out
    assert "round 1: left out (client_error): client 1: a fault inside" in said and "7.png" not in said and "Mary" not in said


def test_a_round_below_the_quorum_is_tried_again_and_is_then_as_if_it_had_never_failed(home, tmp_path, monkeypatch, capsys):
    lossy = "codec=int4 strategy=scaffold recipe.optimizer=sgd rounds=3"
    _, steady = by_flower(home, tmp_path / "a", lossy)
    real, failed = local.train, []

    def twice(client, round, *more):
        if client.index == 1 and round == 2 and len(failed) < 2:
            failed.append(round)
            raise OSError(28, "no space left")
        return real(client, round, *more)

    monkeypatch.setattr(local, "train", twice)
    _, adapter = by_flower(home, tmp_path / "b", lossy, "retries=2")
    assert all(torch.equal(adapter[n], steady[n]) for n in steady) and capsys.readouterr().out.count("the round is tried again") == 2
    failed.clear()
    with pytest.raises(QuorumLost, match=r"quorum lost: round 2 needs updates of 3 of 3 clients, got [12]; client 1: .*no space left \(client_error\); resume with resume=demo-"):
        by_flower(home, tmp_path / "c", lossy, "retries=1")


def test_a_lost_quorum_is_exit_status_5_by_every_road(home, tmp_path, capsys):
    words = settings(home, tmp_path, "recipe.lr.head=1e38 recipe.warmup=0 engine=inprocess").split()
    assert launch.main(["--clients", "2", *words]) == 5
    said = capsys.readouterr().err
    assert "error: quorum lost: round 1 needs updates of 2 of 2 clients, got " in said and said.rstrip().endswith("(exit status 5)")
    assert launch.STATUS.search(said.strip().splitlines()[-1])[1] == "5"


def test_what_a_round_that_did_not_count_left_in_a_clients_folder_is_taken_back(home, tmp_path, monkeypatch):
    """c is the mean of all c_k, though client 1's share of round 2 was refused."""
    from clients.state import Drawer

    real = local.train

    def spoilt(client, round, *more):
        update, *rest = real(client, round, *more)
        return ({n: t * torch.nan for n, t in update.items()}, *rest) if client.index == 1 and round == 2 else (update, *rest)

    monkeypatch.setattr(local, "train", spoilt)
    states = []
    from strategies.checkpoint import Checkpoints

    commit = Checkpoints.commit
    monkeypatch.setattr(Checkpoints, "commit", lambda self, round, tree, accuracy=None: (states.append(tree["state"]), commit(self, round, tree, accuracy)))
    by_flower(home, tmp_path, "strategy=scaffold recipe.optimizer=sgd rounds=3 quorum=0.6")
    run = next(tmp_path.glob("demo-*")).name
    own = [Drawer(str(tmp_path / "state"), run, k).recall("control", 3)[1] for k in range(3)]
    for name in own[0]:
        assert torch.allclose(states[-1][f"control.{name}"], sum(c[name] for c in own) / 3, atol=1e-6)


def test_a_node_that_is_away_costs_nothing_and_one_that_comes_back_takes_part_again(home, tmp_path, monkeypatch):
    away: set[int] = set()

    class Leaving(inprocess.InProcessGrid):
        def get_node_ids(self):
            return [n for n in super().get_node_ids() if n not in away]

        def _work(self, message):
            if message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 1002:
                away.symmetric_difference_update({1001})  # after round 1 it goes, after round 2 it is back
            return super()._work(message)

    monkeypatch.setattr(inprocess, "InProcessGrid", Leaving)
    by_flower(home, tmp_path, "quorum=0.6 rounds=3 codec=int4")
    rows = [json.loads(line) for line in next(tmp_path.glob("demo-*/rounds.jsonl")).read_text().splitlines()]
    assert [row["cohort"] for row in rows] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert [len(row["evaluations"]) for row in rows] == [3, 2, 3] and {r["code"] for r in rows[1]["refused"]} == {"lost"}


def test_what_the_engine_answers_for_a_node_that_went_away_in_mid_round_is_an_answer(home, tmp_path, monkeypatch):
    """It comes under the SuperLink's own name, and again at every look: it must neither be passed over nor put off the deadline."""
    pull = inprocess.InProcessGrid.pull_messages

    def gone(self, ids):
        found = []
        for reply in pull(self, ids):
            metadata = reply.metadata
            if metadata.message_type == "train" and metadata.src_node_id == 1001:
                error = Message(Error(code=5, reason="Error: Node Unavailable - The destination node is currently unavailable."), reply_to=reply)
                error.metadata.__dict__.update(_src_node_id=1, _reply_to_message_id=metadata.reply_to_message_id)
                reply = error
            found.append(reply)
        return found

    monkeypatch.setattr(inprocess.InProcessGrid, "pull_messages", gone)
    by_flower(home, tmp_path, "quorum=0.6")
    rows = [json.loads(line) for line in next(tmp_path.glob("demo-*/rounds.jsonl")).read_text().splitlines()]
    assert all([(r["client"], r["code"]) for r in row["refused"]] == [(1, "lost")] and "Node Unavailable" in row["refused"][0]["reason"] for row in rows)


def test_a_run_begins_whole_or_not_at_all(home, tmp_path, monkeypatch, capsys):
    """Two of three nodes come: bounded, with a countdown, and the number of those who came; one that comes late is waited for."""
    ids, late = inprocess.InProcessGrid.get_node_ids, []
    monkeypatch.setattr(inprocess.InProcessGrid, "get_node_ids", lambda self: list(ids(self))[:2])
    with pytest.raises(RollCallError, match="3 clients must come within 1 s, got 2; start more nodes or raise wait"):
        by_flower(home, tmp_path, "wait=1")
    assert "waiting for clients: 2 of 3, 1 s left" in capsys.readouterr().out and not list(tmp_path.glob("demo-*/rounds.jsonl"))
    monkeypatch.setattr(inprocess.InProcessGrid, "get_node_ids", lambda self: list(ids(self))[: 2 + (len(late) > 3)] if late.append(1) is None else [])
    by_flower(home, tmp_path, "wait=5")
    assert json.loads(next(tmp_path.glob("demo-*/summary.json")).read_text())["clients"] == 3


def test_a_worker_that_died_ends_the_run_whatever_the_quorum(home, tmp_path, monkeypatch):
    work = inprocess.InProcessGrid._work

    def dying(self, message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            return Message(Error(code=0, reason="ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."), reply_to=message)
        return work(self, message)

    monkeypatch.setattr(inprocess.InProcessGrid, "_work", dying)
    by_flower(home, tmp_path / "deployed", "quorum=0.6")  # where there is no Ray that is a node's own word, and costs its answer alone
    monkeypatch.setitem(sys.modules, "ray", object())
    with pytest.raises(RunFailed, match="a worker of the engine died at the work of client 1, and those left would fail in turn; resume the run"):
        by_flower(home, tmp_path, "quorum=0.1 retries=5")


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_ends_the_run_loudly_and_it_can_be_resumed(home, tmp_path, capfd):
    """Flower itself calls such a run completed: the worker is never started again, and its clients fail to the end."""
    words = settings(home, tmp_path, "clients=3 rounds=8 quorum=0.3 retries=3").split()

    over = threading.Event()

    def kill() -> None:
        while not list(tmp_path.glob("demo-*/rounds.jsonl")):
            if over.wait(0.1):  # a run that ends without a round leaves nobody to kill
                return
        (victim, *_) = [p for p in processes.tree(os.getpid()) if b"ClientAppActor" in (processes.PROC / str(p) / "cmdline").read_bytes()]
        os.kill(victim, signal.SIGKILL)

    with engine() as own:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            assert not own.run(3, 2, words)
        finally:
            over.set()
            killer.join()
        assert "error: a worker of the engine died at the work of client" in capfd.readouterr().out
        (run,) = tmp_path.glob("demo-*")
        assert not (run / "summary.json").exists()
        assert own.run(3, 2, [*words, f"resume={run.name}"]) and (run / "summary.json").exists()


def test_a_client_that_says_it_has_more_images_than_there_are_is_named(home, tmp_path, monkeypatch):
    real = local.roll
    monkeypatch.setattr(local, "roll", lambda client: real(client) | ({"train": 10**15} if client.index == 2 else {}))
    with pytest.raises(RollCallError, match="client 2 may have at most gate.examples=10000000 images, says 1000000000000000"):
        by_flower(home, tmp_path)


# Whatever one client answers, the others go on ---------------------------------------------------------------------------


def facts(*path):
    """Change the facts of a reply: the last argument in the place that the others name."""
    def spoil(content):
        told = json.loads(content["facts"]["json"])
        inner = told
        for name in path[:-2]:
            inner = inner[name]
        inner[path[-2]] = path[-1]
        content["facts"]["json"] = json.dumps(told)
        return content

    return spoil


def header(text, array=True):
    def spoil(content):
        content["facts"]["header"] = text
        if not array and "adapter" in content:
            del content["adapter"]
        return content

    return spoil


def low_rank_bomb(content):
    """The factors of a matrix of 80 GB, in a message no longer than others."""
    rows = [[name, [140_000, 140_000] if name.startswith("patch_embed.proj.weight") else shape, size] for name, shape, size in json.loads(content["facts"]["header"])]
    content["facts"]["header"] = json.dumps(rows)
    return content


TRAIN = {
    "behind for ever": (lambda c: to_content({"behind": True}), "schema"),
    "behind with a header": (lambda c: header("garbage")(to_content({"behind": True})), "schema"),
    "a header and no array": (header("garbage", array=False), "schema"),
    "a header that is none": (header("garbage"), "schema"),
    "a header of other things": (header(r'[["\ud800head",[2,3],24]]'), "schema"),
    "a bomb of low rank": (low_rank_bomb, "layout"),
    "an error that cannot be printed": (lambda c: to_content({"error": "\ud800\x1b[2J\nerror: x (exit status 0)"}), "client_error"),
    "a run that cannot be printed": (facts("run", "\ud800"), "stale"),
    "its own score of no images": (facts("metrics", "own_examples", 0), "metrics"),
    "steps without end": (facts("metrics", "steps", 1e300), "schema"),
    "half a step": (facts("metrics", "steps", 1.5), "schema"),
    "a list of examples": (facts("examples", [1]), "schema"),
    "true examples": (facts("examples", True), "schema"),
    "metrics of text": (facts("metrics", "much"), "schema"),
    "facts that are a list": (lambda c: RecordDict({"facts": ConfigRecord({"json": "[]"})}), "schema"),
    "nothing": (lambda c: RecordDict(), "schema"),
}  # fmt: skip
EVALUATE = {
    "a header and no array": (header("garbage", array=False), "schema"),
    "more right than there are": (facts("correct", 10**6), "metrics"),
    "no loss": (facts("loss", float("nan")), "metrics"),
    "a count of text": (facts("examples", "x"), "schema"),
    "behind for ever": (lambda c: to_content({"behind": True}), "schema"),
}


@pytest.mark.parametrize("case", first(8, [("train", name) for name in TRAIN] + [("evaluate", name) for name in EVALUATE]), ids=str)
def test_whatever_one_client_answers_the_run_goes_on_with_the_others(home, tmp_path, monkeypatch, case):
    kind, name = case
    spoil, code = {"train": TRAIN, "evaluate": EVALUATE}[kind][name]
    work = inprocess.InProcessGrid._work

    def spoilt(self, message):
        reply = work(self, message)
        if message.metadata.message_type == kind and message.metadata.dst_node_id == 1001:
            return Message(spoil(reply.content), reply_to=message)
        return reply

    monkeypatch.setattr(inprocess.InProcessGrid, "_work", spoilt)
    lossy = "codec=int4_low_rank" if "low rank" in name else ""
    by_flower(home, tmp_path, "quorum=0.6 rounds=1", lossy)
    (row,) = [json.loads(line) for line in next(tmp_path.glob("demo-*/rounds.jsonl")).read_text().splitlines()]
    assert [(r["client"], r["code"]) for r in row["refused"]] == [(1, code)] and row["refused"][0]["reason"].isprintable()


@pytest.mark.parametrize("change", [{"full_bytes": "x"}, {"digests": []}, {"train": -1}, {"evaluate": 0}, {"faults": {"a": "b"}}, {"machine": 3}, {"more": 1}, {"of": 10**400}])
def test_a_roll_that_cannot_be_is_one_line_before_anybody_trains(home, tmp_path, monkeypatch, change):
    real = local.roll
    monkeypatch.setattr(local, "roll", lambda client: real(client) | (change if client.index == 0 else {}))
    with pytest.raises((RollCallError, RunFailed), match="must answer the roll call|must carry its facts|others of") as caught:
        by_flower(home, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("demo-*/rounds.jsonl"))


# What a message may be ------------------------------------------------------------------------------------------------

GOOD = pack({"head.weight": torch.ones(2, 3)}, float32())


def message(content: RecordDict) -> Message:
    inprocess.InProcessGrid(client_app, 1, {})
    return Message(content, dst_node_id=1, message_type="train")


def with_data(data: bytes, shape=(24,), dtype: str = "uint8") -> RecordDict:
    content = to_content({"run": "r"}, GOOD)
    content["adapter"] = ArrayRecord({"flat": Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)})
    return content


def npy(shape: str, body: bytes = b"\0" * 24, descr: str = "|u1") -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + body


@pytest.mark.parametrize(
    "data",
    [npy("(160000000000,)"), npy("(25,)"), npy("(23,)"), npy("(24,1)"), npy("(3,)", descr="<f8"), npy("(24,)", descr="|O"), b"", b"PK\x03\x04", npy("(24,)")[:40]],
    ids=["a bomb", "longer", "shorter", "two sides", "floats", "objects", "nothing", "a zip", "cut"],
)
def test_an_array_that_lies_about_itself_is_refused_before_any_memory_is_taken(data):
    with pytest.raises(WireError, match="one flat adapter"):
        packed_of(message(with_data(data)))
    assert packed_of(message(with_data(npy("(24,)")))).payload.size == 24


def test_a_message_with_more_than_its_records_or_bytes_is_refused():
    content = to_content({"run": "r"}, GOOD)
    with pytest.raises(TooLarge, match="at most 20 bytes"):
        packed_of(message(content), 20)
    content["second"] = ArrayRecord({"flat": Array(np.zeros(3))})
    with pytest.raises(WireError, match="records facts and adapter, got 'second', too"):
        facts_of(message(content))
    with pytest.raises(WireError, match="facts"):
        facts_of(message(RecordDict({"facts": ConfigRecord({"json": "[" * 70_000})})))
    two = to_content({"run": "r"}, GOOD)
    two["adapter"]["more"] = Array(np.zeros(3))
    with pytest.raises(WireError, match="one flat adapter"):
        packed_of(message(two))


@pytest.mark.parametrize(
    "packed, code",
    [(Packed("[]", np.zeros(5, np.uint8)), "schema"), (Packed("[[1]]", np.zeros(5, np.uint8)), "schema"), (Packed("[" + "0," * 9000 + "0]", np.zeros(0, np.uint8)), "size"), (Packed("[]", np.zeros(20_000, np.uint8)), "size")],
)
def test_what_is_no_packed_adapter_or_too_large_for_one_has_a_code(packed, code):
    assert answer_of(3, message(to_content({"run": "r"}, packed)), 10_000).refused.code == code


# What a client takes from a server ------------------------------------------------------------------------------------


def order(config, change: dict = {}) -> dict:
    return {"run": "run", "round": 1, "config": config.digest(), "recipe": config.recipe.to_json()} | change


@pytest.mark.parametrize(
    "change, says",
    [
        ({"run": "../../etc"}, "a run's name must be"), ({"run": None}, "a run's name must be"), ({"round": 0}, "a round must be one of this run's"),
        ({"round": 99}, "a round must be"), ({"round": True}, "a round must be"), ({"config": "0" * 16}, "a message must be of this client's config"),
    ],
)  # fmt: skip
def test_a_client_takes_no_order_of_another_run_round_or_config(change, says):
    config = load("rounds=5")
    assert gate.mark(order(config), config)["round"] == 1
    with pytest.raises(WireError, match=says):
        gate.mark(order(config, change), config)


@pytest.mark.parametrize("change", [{"epochs": 10**9}, {"batch": 1}, {"batch": 4096}, {"lr": {"head": -1.0}}, {"lr": {"head": float("inf")}}, {"deadline": 99.0}, {"deadline": 0.0}, {"keep": []}])
def test_a_client_takes_no_recipe_that_asks_for_more_than_its_config(home, tmp_path, change):
    client = local.open_client(load(settings(home, tmp_path, "recipe.deadline=9 recipe.keep=[head] clients=2")), 0, 2)
    own, _ = expected.asked(client, 1)
    facts = {"recipe": own.to_json(), "scored": scores_own(client.config, 1)}
    assert expected.order(client, facts, 1) == own
    text = json.dumps(json.loads(own.to_json()) | change)
    with pytest.raises(WireError, match="an order must"):
        expected.order(client, facts | {"recipe": text}, 1)
    assert isinstance(own, Recipe)


A, HEAD = "blocks.0.attn.qkv.q.lora_a.weight", "head.weight"
MODEL = {A: torch.zeros(4, 8), HEAD: torch.zeros(3, 8)}


@pytest.mark.parametrize(
    "received, says",
    [
        ({HEAD: torch.zeros(4, 8)}, r"head.weight must be \(3, 8\), got \(4, 8\)"), ({A: torch.zeros(5, 8)}, "must be"), ({A: torch.zeros(32)}, "must be"),
        ({"pos_embed": torch.zeros(1)}, "the model's own tensors, got 'pos_embed'"), ({HEAD: torch.full((3, 8), torch.nan)}, "must be finite"),
        ({"control.head.bias": torch.zeros(3)}, "got 'head.bias'"), ({"base.x.weight": torch.full((2, 2), torch.inf)}, "must be finite"),
        ({"control.head.weight": torch.zeros(2, 8)}, "must be"),
    ],
)  # fmt: skip
def test_a_client_takes_no_adapter_that_is_not_its_models(received, says):
    def judged(received):
        gate.fitting({n: tuple(t.shape) for n, t in received.items()}, MODEL)
        return gate.finite(received)

    assert judged({A: torch.zeros(2, 8), HEAD: torch.ones(3, 8)})
    with pytest.raises(WireError, match=says):
        judged(received)


@pytest.mark.parametrize("safe, counted", [(-1, 0), (0, -1), (3, 0), (0, 3), ("0", 0), (None, 0), (True, 0)])
def test_a_client_forgets_nothing_at_a_servers_bad_word(safe, counted):
    assert gate.past({"round": 3, "safe": 1, "counted": 2}) == (1, 2)
    with pytest.raises(WireError, match="which rounds before it are safe and counted"):
        gate.past({"round": 3, "safe": safe, "counted": counted})


@pytest.mark.parametrize("since, upto", [(0, 10**12), (3, 2), (-1, 2), ("0", 2), (0, None)])
def test_a_client_counts_no_rounds_that_are_not_in_the_run(since, upto):
    gate.span({"since": 0, "upto": 5}, load("rounds=5"))
    with pytest.raises(WireError, match="sums must be of rounds of this run"):
        gate.span({"since": since, "upto": upto}, load("rounds=5"))
