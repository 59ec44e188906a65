"""A client with its own pictures alone: the same run, bit for bit, with a folder each as on the whole source."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_simulation import by_flower, by_loop, equal, home, settings  # noqa: F401

from clients import client_app, failure, holdings, local, partition
from fl import keys
from fl.config import Config, ConfigError, load
from fl.datasets import DataError, own
from simulations import launch
from strategies.exchange import RunFailed
from strategies.rollcall import RollCallError


def config(home: Path, *more: str) -> Config:
    """A config whose output goes nowhere, the same for all tests: composing one takes its time."""
    return load(settings(home, home, *more))


def folders(home: Path, out: Path, *more: str, encrypt: bool, of: int = 3) -> str:
    """A folder for each client; returns the overrides that name them."""
    for i in range(of):
        partition.write(config(home, *more), i, of, out / f"own-{i}", encrypt=encrypt)
    return " ".join(f"+nodes.{i}.own={out / f'own-{i}'}" for i in range(of))


def forget() -> None:
    """As in a new process."""
    local.SHELF.__init__()
    for cache in (local.open_client, holdings._source, holdings._split):
        cache.cache_clear()


@pytest.fixture
def no_source(monkeypatch):
    """From the call on there is no source but the folders."""

    def gone(config):
        raise AssertionError("a client with its own pictures read the source")

    return lambda: (forget(), monkeypatch.setattr(holdings, "whole", gone), monkeypatch.setattr(holdings, "cut", gone))


SLOW = pytest.mark.slow
RUNS = [
    (True, "recipe.augment=true"),
    (False, "recipe.augment=true start=public partition=dirichlet validation=0.2 evaluate_on=validation"),
    pytest.param(True, "blind=true seal.largest=200 recipe.augment=true", marks=SLOW),
    pytest.param(False, "recipe.augment=true", marks=SLOW),
    pytest.param(True, "start=public partition=dirichlet validation=0.2 evaluate_on=validation", marks=SLOW),
    pytest.param(True, "recipe.augment=true step=plain start=public", marks=SLOW),
    pytest.param(False, "blind=true seal.largest=200 partition=quantity", marks=SLOW),
]


@pytest.mark.parametrize("encrypt, more", RUNS)
def test_a_folder_for_each_client_gives_the_run_on_the_whole_source(home, tmp_path, no_source, more, encrypt):
    (ours, adapter), names = by_loop(home, tmp_path, more), folders(home, tmp_path, more, encrypt=encrypt)
    no_source()
    theirs, same = by_loop(home, tmp_path / "own", more, names)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"] and ours["loss"] == theirs["loss"]


@pytest.mark.parametrize("encrypt", [pytest.param(False, marks=SLOW), True], ids=["plain", "encrypted"])
def test_so_it_does_through_flower_and_only_plain_folders_leave_a_picture(home, tmp_path, no_source, encrypt):
    (_, adapter), names = by_loop(home, tmp_path), folders(home, tmp_path, encrypt=encrypt)
    no_source()
    _, same = by_flower(home, tmp_path / "own", names)
    assert equal(adapter, same)
    assert len(list((tmp_path / "own").rglob("preview.png"))) == (0 if encrypt else 1)
    assert not list((tmp_path / "own").rglob("split.json"))


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "blind=true seal.largest=200"])
def test_some_may_have_folders_and_others_the_whole_source(home, tmp_path, more):
    (_, adapter), names = by_loop(home, tmp_path, more), folders(home, tmp_path, encrypt=True)
    _, same = by_loop(home, tmp_path / "own", more, names.split()[1])
    assert equal(adapter, same)


@pytest.mark.slow
def test_so_it_does_on_ray(home, tmp_path):
    (_, adapter), names = by_loop(home, tmp_path), folders(home, tmp_path, encrypt=True)
    with launch.engine() as engine:
        assert engine.run(3, 2, settings(home, tmp_path / "own", names).split(), show=False)
    found = next((tmp_path / "own").glob("demo-*/adapter.safetensors"))
    assert equal(adapter, local.adapters.load(found))


def test_a_node_names_its_folder_in_its_own_settings(home, tmp_path):
    from flwr.app import Context, RecordDict

    words = settings(home, tmp_path)
    node = {"partition-id": 1, "num-partitions": 3, "partition-path": "/mine"}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={"overrides": words})
    there, here = client_app.at_node(context, 1), load(words)
    assert there.own == "/mine" and here.own is None and there.digest() == here.digest()
    assert failure.closed(DataError("x in /mine is damaged"), there) == "its pictures: own; its log says why"
    with pytest.raises(ConfigError, match="own: must be absolute"):
        load(words + " own=mine")


def test_the_folder_says_what_it_holds_and_is_for_its_owner_alone(home, tmp_path):
    said = partition.write(config(home, "validation=0.25"), 1, 3, tmp_path / "a", encrypt=True)
    facts, parts = own.read(tmp_path / "a")
    assert json.loads(json.dumps(said)) == said
    assert said["images"] == {"train": 30, "validation": 10, "test": 23} == {p: len(e.labels) for p, e in parts.items()}
    assert sum(said["by_class"]["train"].values()) == 30 and said["encrypted"]["key"] == keys.read(home / "key").fingerprint
    assert facts.encrypted.block == 8 and said["split"] == facts.split == holdings.cut(config(home, "validation=0.25"), 3).digest()
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()} == {own.TENSORS: 0o600, own.FACTS: 0o600}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_a_folder_is_written_whole_or_not_at_all(home, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own, "save_file", full)
    with pytest.raises(OSError):
        partition.write(config(home), 0, 3, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    monkeypatch.undo()
    partition.write(config(home), 0, 3, tmp_path / "a")
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        partition.write(config(home), 0, 3, tmp_path / "a")


@pytest.mark.parametrize(
    "more, how, says",
    [
        ("", {"index": 3}, "--index 3 --of 3"),
        ("", {"index": -1}, "--index -1 --of 3"),
        ("cipher=plain", {"encrypt": True}, "set cipher=pixel_shuffle"),
        ("own=/elsewhere", {}, "leave own out"),
        ("data.train=4", {}, "3 clients need at least"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(home, tmp_path, more, how, says):
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        partition.write(config(home, more), **{"index": 0, "of": 3, "out": tmp_path / "a"} | how)
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def rewrite(old: str, new: str):
    def edit(folder: Path) -> None:
        text = (folder / own.FACTS).read_text()
        assert old in text
        (folder / own.FACTS).write_text(text.replace(old, new, 1))

    return edit


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: flip(f / own.TENSORS), r"partition\.safetensors in .* must have the SHA-256 .* it is damaged"),
        (lambda f: cut_short(f / own.TENSORS), r"partition\.safetensors in .* must have \d+ bytes, got \d+"),
        (lambda f: (f / own.TENSORS).unlink(), r"must hold partition\.safetensors, but it cannot be read"),
        (lambda f: (f / own.FACTS).unlink(), r"must be a folder that veilora partition wrote"),
        (rewrite('"index": 0', '"index": 1'), r"partition\.json in .* must be as it was written, but its SHA-256"),
        (rewrite('"version": 1', '"version": 2'), r"partition\.json in .* must be of version 1, got 2"),
        (lambda f: cut_short(f / own.FACTS) or cut_short(f / own.FACTS), r"partition\.json in .* must be as it was written, but is damaged"),
        (lambda f: (f / own.FACTS).write_text("[]"), r"partition\.json in .* must be as it was written, but is damaged"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(home, tmp_path, damage, says):
    partition.write(config(home), 0, 3, tmp_path / "a")
    own.read(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=says) as caught:
        local.open_client(config(home).model_copy(update={"own": str(tmp_path / "a")}), 0, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "run, index, says",
    [
        ("", 1, "was written for client 0, and this run has 1"),
        ("model.image=16", 0, "was written for model.image 32, and this run has 16"),
        pytest.param("model.patch=4", 0, "was written for model.patch 8, and this run has 4", marks=SLOW),
        pytest.param("seed=1", 0, "was written for seed 0, and this run has 1", marks=SLOW),
        pytest.param("partition=shards", 0, "was written for partition .*iid.*, and this run has .*shards", marks=SLOW),
        pytest.param("data.train=300", 0, "was written for data .*120.*, and this run has .*300", marks=SLOW),
        pytest.param("cipher=plain", 0, "was written for cipher .*pixel_shuffle.*, and this run has .*plain", marks=SLOW),
        ("key=OTHER", 0, "was written for key [0-9a-f]{16}, and this run has [0-9a-f]{16}"),
    ],
)
def test_a_folder_of_another_run_is_named_in_one_line(home, tmp_path, run, index, says):
    partition.write(config(home), 0, 3, tmp_path / "a", encrypt=True)
    keys.create(tmp_path / "other")
    with pytest.raises(DataError, match=says) as caught:
        local.open_client(config(home, f"own={tmp_path / 'a'}", run.replace("OTHER", str(tmp_path / "other"))), index, 3)
    assert "\n" not in str(caught.value)


def test_what_is_held_out_must_be_there(home, tmp_path):
    partition.write(config(home), 0, 1, tmp_path / "a", own=True)
    with pytest.raises(DataError, match="write it anew with validation=0.1"):
        local.open_client(config(home, f"own={tmp_path / 'a'} validation=0.1 evaluate_on=validation"), 0, 1)


def pictures(root: Path, seed: int, count: int, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """A hospital's folder: two classes, told apart by brightness."""
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                shade = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8) + 100 * label
                Image.fromarray(shade.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.slow
def test_clients_with_pictures_of_their_own_agree_although_nothing_was_cut(home, tmp_path):
    names, more = [], "validation=0.25"
    for i, count in enumerate((8, 12)):
        words = f"data=folder data.root={pictures(tmp_path / f'hospital-{i}', i, count)} {more}"
        words = settings(home, tmp_path).replace("data.train=120 data.test=60", "") + " " + words
        said = partition.write(load(words), i, 2, tmp_path / f"own-{i}", encrypt=i == 0, own=True)
        assert said["images"] == {"train": count * 3 // 2, "validation": count // 2, "test": 2 * count} and said["own"]
        names.append(f"+nodes.{i}.own={tmp_path / f'own-{i}'}")
    one, two = (local.open_client(load(f"{words} own={tmp_path / name}"), 0, 2) for name in ("own-0", "own-1"))
    assert len(one.train.labels) == 12 and len(two.train.labels) == 18 and one.bench is two.bench  # and no pictures mixed
    words = words.replace(str(tmp_path / "hospital-1"), "/nowhere") + " rounds=1 "
    summary = launched(words + " ".join(names), tmp_path)
    assert summary["train_examples"] == 12 + 18 and summary["examples"] == 16 + 24
    swapped = words + " ".join(names).replace("nodes.0", "nodes.9").replace("nodes.1", "nodes.0").replace("nodes.9", "nodes.1")
    assert launched(swapped, tmp_path)["train_examples"] == 30  # no place of its own in the cut: there is none

    odd = load(words.replace("/nowhere", str(pictures(tmp_path / "odd", 9, 4, ("ant", "wasp")))))
    partition.write(odd, 1, 2, tmp_path / "odd-own", own=True)
    with pytest.raises(RollCallError, match="has other classes"):
        launched(words + names[0] + f" +nodes.1.own={tmp_path / 'odd-own'}", tmp_path)


def launched(words: str, out: Path) -> dict:
    from fl.journal import Journal
    from simulations import loop

    forget()
    run = load(words + " clients=2")
    return loop.run(run, Journal(run, "loop"))


def test_one_client_that_cut_otherwise_is_named(home, tmp_path):
    names = folders(home, tmp_path, encrypt=False, of=3)
    partition.write(config(home), 2, 3, tmp_path / "all", own=True)
    with pytest.raises(RollCallError, match="client 2 cut the data otherwise"):
        by_loop(home, tmp_path, names.replace(str(tmp_path / "own-2"), str(tmp_path / "all")))


def test_a_broken_folder_reaches_the_server_in_one_line_without_its_path(home, tmp_path, monkeypatch):
    monkeypatch.setattr(failure, "simulated", lambda: False)
    names = folders(home, tmp_path, encrypt=False)
    flip(tmp_path / "own-1" / own.TENSORS)
    with pytest.raises(RunFailed) as caught:
        by_flower(home, tmp_path, names)
    assert str(caught.value) == "client 1: its pictures: own; its log says why"


def test_encrypted_pictures_are_never_written_plain_and_come_back_exactly(home, tmp_path):
    run, place = config(home), tmp_path / "a"
    partition.write(run, 0, 3, place, encrypt=True)
    plain, hidden = local.open_client(run, 0, 3), local.open_client(run.model_copy(update={"own": str(place)}), 0, 3)
    assert torch.equal(plain.plain.images, hidden.plain.images) and torch.equal(plain.train.images, hidden.train.images)
    assert torch.equal(hidden.holdings.train.source.images, hidden.train.images)
    assert not torch.equal(hidden.train.images, plain.plain.images)
