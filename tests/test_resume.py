"""What resumes equals what never stopped, wherever it was stopped; what is damaged is said, and never taken."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import first
from test_simulation import equal, home, settings  # noqa: F401

from clients import local
from clients.client_app import app as client_app
from fl import durable, keys
from fl.adapter import flat
from fl.adapter import load as load_adapter
from fl.config import ConfigError, load
from fl.durable import IntegrityError
from fl.journal import Journal
from fl.tree import described, rebuilt
from simulations import inprocess, loop
from strategies.checkpoint import Checkpoints, Kept, chosen
from strategies.grown import Grown
from strategies.rollcall import RollCallError
from strategies.server_app import app as server_app

KINDS = {
    "default codec": "codec=int4_low_rank",
    "moments": "strategy=fedadam codec=int8 fraction=0.6",
    "variates": "strategy=scaffold recipe.optimizer=sgd codec=int4",
    "base": "strategy=flora",
    "base, lossy": "strategy=fedex_lora codec=int8",
    "personal": "recipe.keep=[head] codec=int4",
    "seldom": "recipe.keep=[head] codec=int4 checkpoint.every=2",
    "ranks": "strategy=flexlora +nodes.1.rank=2 codec=int4",
    "blind": "blind=true seal.largest=200 strategy=fedavgm fraction=0.6 seal.bits=16 seal.members=2",
}


class Stop(Exception):
    """The end of the process, as near as one process can come to it."""


def by_loop(home: Path, out: Path, *more: str) -> dict:
    config = load(settings(home, out, "clients=3 rounds=4", *more))
    loop.run(config, Journal(config, "run"), local.train)
    return load_adapter(out / "run" / "adapter.safetensors")


def by_flower(home: Path, out: Path, *more: str) -> dict:
    inprocess.run(server_app, client_app, 3, settings(home, out, "clients=3 rounds=4", *more))
    return load_adapter(out / "run" / "adapter.safetensors")


@pytest.fixture(autouse=True)
def named_run(monkeypatch):
    monkeypatch.setattr("strategies.server_app.run_name", lambda config: "run")


def stopping(monkeypatch, where: str, round: int) -> None:
    """Let the process end in ``round``: while a client trains or evaluates, or at a moment of the commit."""
    if where in ("train", "score"):
        target, asked = (local, where), []

        def ends(client, *given, real=getattr(local, where)):
            asked.append(client.index)
            if client.index == 1 and asked.count(1) == round:
                raise Stop
            return real(client, *given)

        monkeypatch.setattr(*target, ends)
        return
    real, seen = durable.write, []

    def write(path, content):
        seen.append(path.name.startswith(where))
        if seen[-1] and sum(seen) == round:
            path.with_name(f".{path.name}.999999999.part").write_bytes(b"half")
            raise Stop
        real(path, content)

    monkeypatch.setattr("fl.durable.write", write)


@pytest.mark.parametrize("kind", first(1, list(KINDS)))
@pytest.mark.parametrize("run", first(1, [by_flower, by_loop]), ids=["flower", "loop"])
def test_a_run_that_is_resumed_equals_one_that_never_stopped(home, tmp_path, monkeypatch, kind, run):
    words = f"{KINDS[kind]} quorum=1.0"
    steady = run(home, tmp_path / "steady", words)
    seldom = kind == "seldom"  # in round 4, or as its checkpoint is written, after that of round 2
    for where, round in (("score" if kind in ("base, lossy", "blind") else "train", 3 + seldom), ("manifest.json", 3 - seldom)):
        out = tmp_path / where
        with monkeypatch.context() as patch:
            stopping(patch, where, 2 if where == "train" and "fraction" in words else round)
            with pytest.raises(Exception):  # Stop itself, or what the client's handler makes of it
                run(home, out, words)
        assert (out / "run" / "checkpoints" / "manifest.json").exists() and not (out / "run" / "summary.json").exists()  # in the middle
        resumed = run(home, out, words, "resume=run")
        assert equal(resumed, steady), where
        rows = [json.loads(line) for line in (out / "run" / "rounds.jsonl").read_text().splitlines()]
        assert [row["round"] for row in rows] == [1, 2, 3, 4] and not [p for p in (out / "run").rglob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["round-", "manifest.before", "manifest.json", "rounds.jsonl", "summary.json", "adapter"])
def test_there_is_no_moment_of_a_commit_at_which_a_run_may_not_be_stopped(home, tmp_path, monkeypatch, where):
    steady = by_loop(home, tmp_path / "steady")
    with monkeypatch.context() as patch:
        stopping(patch, where, 1 if where in ("summary.json", "adapter") else 2)
        with pytest.raises(Stop):
            by_loop(home, tmp_path)
    assert equal(by_loop(home, tmp_path, "resume=run"), steady)
    assert not list((tmp_path / "run").rglob(".*.part")) and (tmp_path / "run" / "summary.json").exists()


def stopped(home: Path, out: Path, monkeypatch, *more: str) -> Path:
    """The checkpoints of a run that ended in round 4."""
    with monkeypatch.context() as patch:
        stopping(patch, "train", 4)
        with pytest.raises(Stop):
            by_loop(home, out, *more)
    return out / "run" / "checkpoints"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": lambda folder: flip(folder / "round-00003.safetensors", -9),
    "cut": lambda folder: os.truncate(folder / "round-00003.safetensors", 100),
    "empty": lambda folder: os.truncate(folder / "round-00003.safetensors", 0),
    "gone": lambda folder: (folder / "round-00003.safetensors").unlink(),
    "two": lambda folder: [flip(folder / f"round-0000{r}.safetensors", 300) for r in (2, 3)],
    "manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", first(1, list(DAMAGE)))
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_taken(home, tmp_path, monkeypatch, capsys, damage):
    lossy = "codec=int4 strategy=scaffold recipe.optimizer=sgd checkpoint.last=3"
    steady = by_loop(home, tmp_path / "steady", lossy)
    folder = stopped(home, tmp_path, monkeypatch, lossy)
    DAMAGE[damage](folder)
    capsys.readouterr()
    resumed = by_loop(home, tmp_path, lossy, "resume=run")
    said = capsys.readouterr().out
    assert equal(resumed, steady)
    assert "damaged" in said or damage == "manifest gone"
    assert f"going on after round {1 if damage == 'two' else 2} of 4" in said


def test_when_all_are_damaged_there_is_nothing_to_go_on_with(home, tmp_path, monkeypatch, capsys):
    folder = stopped(home, tmp_path, monkeypatch)
    for path in folder.glob("round-*"):
        flip(path, -1)
    with pytest.raises(IntegrityError, match="a checkpoint must be as it was written, but none in .* is; start the run anew"):
        by_loop(home, tmp_path, "resume=run")
    words = settings(home, tmp_path, "clients=3 rounds=4 resume=run").split()
    assert loop.main(words) == 6 and "error: a checkpoint must be as it was written" in capsys.readouterr().err


def test_a_full_disk_is_said_and_the_run_goes_on(home, tmp_path, monkeypatch, capsys):
    steady = by_loop(home, tmp_path / "steady")
    real = os.fsync

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "round-00002" in name or "rounds.jsonl" in name and "round-00001" in " ".join(p.name for p in (tmp_path / "run" / "checkpoints").glob("*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr("fl.durable.os.fsync", full)
        assert equal(by_loop(home, tmp_path, "checkpoint.last=9"), steady)
    said = capsys.readouterr().out
    assert "warning: the checkpoint of round 2 could not be written (No space left on device); make room: to resume there is round 1" in said
    assert "warning: rounds.jsonl could not be written (No space left on device)" in said
    assert {int(p.stem[-5:]) for p in (tmp_path / "run" / "checkpoints").glob("round*")} <= {1, 3, 4}
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 1  # the disk stayed full: nothing is half written


@pytest.mark.slow
def test_an_adapter_that_cannot_be_kept_fails_the_run_which_is_then_resumed_at_its_end(home, tmp_path, monkeypatch):
    real = durable.write

    def full(path, content):
        if path.name == "adapter.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("fl.durable.write", full)
        with pytest.raises(IntegrityError, match="the final adapter could not be written .No space left on device.; make room, and resume=run"):
            by_loop(home, tmp_path)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert equal(by_loop(home, tmp_path, "resume=run"), by_loop(home, tmp_path / "steady"))


def test_another_config_is_refused_with_the_difference(home, tmp_path, monkeypatch):
    stopped(home, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"a run is resumed with the config that it began with, but recipe.lr.head was 0.01, now 0.5; seed was 0, now 3$"):
        by_loop(home, tmp_path, "resume=run seed=3 recipe.lr.head=0.5")
    with pytest.raises(ConfigError, match="resume must name a run in .*, got 'ran' .*; the newest are run"):
        by_loop(home, tmp_path, "resume=ran")
    by_loop(home, tmp_path, "resume=run quorum=0.5 wait=7")  # patience is no part of what is computed


def test_another_federation_is_refused_with_the_difference(home, tmp_path, monkeypatch):
    stopped(home, tmp_path, monkeypatch)
    keys.create(tmp_path / "other")
    with pytest.raises(RollCallError, match="a run is resumed by the federation that it began with, but key was .*, now "):
        inprocess.run(server_app, client_app, 3, settings(home, tmp_path, f"clients=3 rounds=4 resume=run key={tmp_path / 'other'}"))
    with pytest.raises(ConfigError, match="clients was 3, now 2"):
        by_loop(home, tmp_path, "resume=run clients=2")
    by_loop(home, tmp_path, "resume=run")


@pytest.mark.slow
def test_a_round_may_be_broken_off_again_and_again(home, tmp_path, monkeypatch):
    lossy = "codec=int4 strategy=scaffold recipe.optimizer=sgd"
    steady = by_loop(home, tmp_path / "steady", lossy)
    for attempt in range(4):
        with monkeypatch.context() as patch:
            stopping(patch, "manifest.json", 1 if attempt else 3)
            with pytest.raises(Stop):
                by_loop(home, tmp_path, lossy, "resume=run" if attempt else "")
    assert equal(by_loop(home, tmp_path, lossy, "resume=run"), steady)


def test_what_the_loop_began_flowers_server_goes_on_with(home, tmp_path, monkeypatch):
    steady = by_loop(home, tmp_path / "steady", "codec=int4")
    stopped(home, tmp_path, monkeypatch, "codec=int4")
    assert equal(by_flower(home, tmp_path, "codec=int4", "resume=run"), steady)


def test_a_run_that_is_finished_is_left_alone(home, tmp_path, capsys):
    by_loop(home, tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    words = settings(home, tmp_path, "clients=3 rounds=4 resume=run")
    assert loop.main(words.split()) == 0 and inprocess.run(server_app, client_app, 3, words) is None
    assert capsys.readouterr().out.count("run is finished; there is nothing to resume") == 2
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_an_end_from_the_keyboard_says_how_to_go_on(home, tmp_path, monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "score", pressed)
        assert loop.main(settings(home, tmp_path, "clients=3").split()) == 130
    (run,) = tmp_path.glob("demo-*")
    assert f"error: stopped; go on with the same words and resume={run.name}" in capsys.readouterr().err
    assert loop.main(settings(home, tmp_path, f"clients=3 resume={run.name}").split()) == 0


def test_two_processes_cannot_have_one_folder(home, tmp_path, monkeypatch):
    stopped(home, tmp_path, monkeypatch)
    config = load(settings(home, tmp_path, "clients=3 rounds=4 resume=run"))
    first = Journal(config, "run")
    first.begin()
    with pytest.raises(ConfigError, match="a run's folder is one process's at a time"):
        by_loop(home, tmp_path, "resume=run")
    first.close()
    by_loop(home, tmp_path, "resume=run")


def killed(home: Path, out: Path, words: str, run) -> None:
    os.setsid()
    torch.set_num_threads(1)
    run(home, out, words)


@pytest.mark.slow
@pytest.mark.parametrize("run", [by_loop, by_flower], ids=["loop", "flower"])
@pytest.mark.parametrize("kind", ["default codec", "blind"])
def test_a_server_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(home, tmp_path, kind, run):
    """Five moments for each of four: SIGKILL of the process that is server and clients in one, so of the nodes, too."""
    words = f"{KINDS[kind]} rounds=6"
    began = time.monotonic()
    steady, lasts = run(home, tmp_path / "steady", words), time.monotonic() - began
    context, stream = multiprocessing.get_context("fork"), random.Random(f"{kind} {run.__name__}")
    for moment in range(5):
        out, resume, kills = tmp_path / str(moment), "", 0
        while not (out / "run" / "summary.json").exists():
            process = context.Process(target=killed, args=(home, out, f"{words} {resume}", run), daemon=True)
            process.start()
            process.join(stream.uniform(0.1, 1.0) * lasts if kills < 2 else None)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            for path in out.rglob("*"):
                assert path.suffix != ".safetensors" or path.name.startswith(".") or load_adapter(path) is not None  # none is half written
            resume = "resume=run" if (out / "run" / "config.yaml").exists() else ""
        assert equal(load_adapter(out / "run" / "adapter.safetensors"), steady)


# The small parts ------------------------------------------------------------------------------------------------------


def test_a_tree_is_written_down_with_its_shape_and_comes_back_bit_for_bit():
    one = torch.randn(3)
    lying = flat({"head.weight": torch.randn(2, 2), "a.lora_a.weight": torch.randn(4)})
    tree = {"state": (lying, {"x": one}, Grown(3, {"y": one}, ({"z": torch.arange(3)},))), 7: [1, 0.1, None, True, "word"], "same": lying}
    shape, tensors = described(tree)
    back = rebuilt(json.loads(json.dumps(shape)), tensors)
    assert len(tensors) == 3 and back[7] == tree[7] and isinstance(back["state"][2], Grown) and back["state"][2].round == 3
    assert back["state"][0].layout == lying.layout and torch.equal(back["same"].buffer, lying.buffer) and back["state"][1]["x"] is back["state"][2].whole["y"]
    with pytest.raises(TypeError, match="got set"):
        described({1, 2})
    for name in ("os:system", "collections:OrderedDict", "strategies.blind:federate", "builtins:tuple"):
        with pytest.raises(ValueError, match="named tuples of this project"):
            rebuilt({"named": name, "parts": []}, {})


def test_the_newest_and_the_best_are_kept():
    kept = [Kept(r, "", "", a) for r, a in enumerate([0.2, 0.9, None, 0.3, 0.4, 0.5], 1)]
    assert [k.round for k in chosen(kept, 2)] == [2, 5, 6] and [k.round for k in chosen(kept[:1], 3)] == [1] and chosen([], 3) == []


def test_checkpoints_come_as_often_as_they_are_wished_and_always_at_the_end(tmp_path):
    for every, rounds in ((1, [6, 7]), (3, [6, 7]), (5, [5, 7]), (0, [])):
        checkpoints = Checkpoints(tmp_path / str(every), load(f"rounds=7 checkpoint.every={every}"))
        for round in range(1, 8):
            checkpoints.commit(round, {"state": torch.ones(round)})
        assert [k.round for k in checkpoints._kept] == rounds == [int(p.stem[-5:]) for p in sorted((tmp_path / str(every)).glob("round*"))]
        round, tree = Checkpoints(tmp_path / str(every), load("rounds=7")).newest()
        assert (round, len(tree["state"]) if tree else 0) == ((7, 7) if every else (0, 0))


def test_a_run_that_is_done_keeps_its_last_checkpoint_and_its_best_and_a_state_that_cannot_be_written_is_said(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, load("rounds=5"), said.append)
    for round, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
        checkpoints.commit(round, {"state": torch.ones(round)}, accuracy)
    checkpoints.end()
    assert sorted(p.name for p in tmp_path.glob("round*")) == ["round-00002.safetensors", "round-00005.safetensors"] and not said
    checkpoints.commit(5, {"state": {1, 2}})
    assert "the run cannot be resumed: a state must be of tensors, numbers, mappings and tuples, got set" in said[0]
