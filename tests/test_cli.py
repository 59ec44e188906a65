"""The commands: what cannot run says so in one line, with a status that is not zero, before any training."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from fl import keys
from fl.config import CONF, load
from simulations import compare, launch, loop
from simulations import grid as grid_of_runs

TINY = [
    "model=vit_tiny", "model.name=vit_tiny_patch16_224", "model.image=32", "model.patch=8", "model.weights=none",
    "+model.embed_dim=32", "+model.depth=1", "+model.num_heads=2", "data.train=60", "data.test=30", "rounds=2", "clients=2",
]  # fmt: skip


@pytest.fixture
def places(tmp_path) -> list[str]:
    keys.create(tmp_path / "key")
    return [f"key={tmp_path / 'key'}", f"output={tmp_path / 'runs'}"]


def refused(capsys, arguments: list[str]) -> str:
    """The one line on standard error of a run that must not start."""
    assert loop.main(arguments) in (2, 4)
    said = capsys.readouterr()
    assert "round" not in said.out, "it trained"
    assert len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said.err
    return said.err


@pytest.mark.parametrize(
    "override, says",
    [
        ("stratgy=fedavg", "did you mean 'strategy'"),
        ("recipe.lrr=1", "did you mean 'recipe.lr'"),
        ("strategy=fedavgg", "did you mean 'fedavg'"),
        ("rounds=many", "rounds: Input should be a valid integer"),
        ("fraction=1.5", "fraction: Input should be less than or equal to 1"),
        ("recipe.lr.head=-1", "recipe.lr.head"),
        ("method.rank=0", "rank: Input should be greater than 0"),
        ("model.image=33", "must be a multiple of model.patch"),
        ("evaluate_on=validation", "set validation=0.1"),
        ("output=here", "output: must be absolute"),
        ("data=cifar10 data.root=/nowhere", "set data.root"),
        ("model.weights=/nowhere/vit.safetensors", "set model.weights to a local file"),
        ("device=cuda:7", "set device=cpu or auto"),
        ("clients=50", "50 clients need at least 100 training"),
        ("cipher=pixel_shuffel", "did you mean 'pixel_shuffle'"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_line(places, capsys, override, says):
    assert says in refused(capsys, TINY + places + override.split())


def test_a_folder_that_is_not_there_is_one_line(places, capsys):
    model = [word for word in TINY if not word.startswith("data.")]
    assert "see data.root" in refused(capsys, [*model, *places, "data=folder", "data.root=/nowhere"])


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda key: key.unlink(), "is missing; carry it from the client that has it, or make the first"),
        (lambda key: key.chmod(0o644), "chmod 600"),
        (lambda key: key.write_bytes(b"short"), "must hold 32 bytes, got 5"),
    ],
)
def test_a_key_that_must_not_be_used_is_one_line(places, capsys, tmp_path, spoil, says):
    spoil(tmp_path / "key")
    assert says in refused(capsys, TINY + places)


def test_one_client_with_another_key_is_named(places, capsys, tmp_path):
    keys.create(tmp_path / "other")
    assert "client 1 holds another key" in refused(capsys, TINY + places + [f"+nodes.1.key={tmp_path / 'other'}"])


def test_the_launcher_starts_no_engine_for_a_bad_override(capsys):
    assert launch.main(["rounds=0"]) == 2 and capsys.readouterr().err.startswith("error: rounds: ")


def test_a_run_that_cannot_begin_leaves_no_folder(places, capsys, tmp_path):
    for more in (["clients=50"], ["strategy=flexlora", "method=linear"], ["blind=true", "strategy=ffa_lora", "method=linear"]):
        refused(capsys, [*TINY, *places, *more])
    assert not (tmp_path / "runs").exists()


def test_what_ends_a_run_in_its_middle_is_one_line_too(places, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert loop.main([*TINY, *places, "codec=int8", f"state={tmp_path / 'file'}"]) == 4
    assert "error: " in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    words = ["codec=int8", "+codec@codecs.patch_embed=low_rank", "recipe.lr.patch_embed=1e38", f"state={tmp_path / 'state'}"]
    assert loop.main([*TINY, *places, *words]) == 4
    assert "error: " in (said := capsys.readouterr().err) and len(said.splitlines()) == 1


def test_a_good_run_ends_with_its_accuracy_and_its_folder(places, capsys, tmp_path):
    assert loop.main(TINY + places) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("accuracy ") for line in said) == 1 and Path(said[-1].removeprefix("output: ")).is_dir()


def test_the_key_command_makes_a_key_once(capsys, tmp_path):
    assert keys.main([str(tmp_path / "k" / "key")]) == 0
    assert keys.read(tmp_path / "k" / "key").fingerprint in capsys.readouterr().out
    assert keys.main([str(tmp_path / "k" / "key")]) == 2 and "exists" in capsys.readouterr().err
    assert keys.main([]) == 2


@pytest.mark.slow
def test_compare_runs_every_cell_once_and_goes_on_where_it_was(places, capsys, tmp_path):
    grid = ["--out", str(tmp_path / "grid"), *TINY, *places, "method=linear,melo"]
    assert compare.main([*grid, "seed=0"]) == 0 and compare.main([*grid, "seed=0,1"]) == 0
    said = capsys.readouterr().out
    assert "2 cells to run, 0 in" in said and "2 cells to run, 2 in" in said
    table = (tmp_path / "grid" / "report.md").read_text()
    assert "| melo | " in table and len(re.findall(r"\d ± \d", table)) == 2
    text = (tmp_path / "grid" / "cells.jsonl").read_text()
    assert str(tmp_path) not in text, "a result names no place of a machine"
    assert all("lean step, " in line["machines"][0] for line in grid_of_runs.read(tmp_path / "grid" / "cells.jsonl"))


def test_a_cell_leaves_no_state_unless_it_names_a_place_for_it(places, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for more in ([], [f"state={tmp_path / 'kept'}"]):
        (cell,) = grid_of_runs.cells([*TINY, *places, "codec=int8", *more])
        assert grid_of_runs.run_cell(cell, "/nowhere")["clients"] == 2
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "home" / "veilora" / "state").exists()
    assert len(list((tmp_path / "kept").glob("*/client-*"))) == 2


@pytest.mark.slow
def test_compare_keeps_what_finished_when_a_cell_fails(places, capsys, tmp_path):
    grid = ["--out", str(tmp_path / "grid"), *TINY, *places, "clients=2,50"]
    assert compare.main(grid) == 4
    assert "clients=50" in capsys.readouterr().err and len((tmp_path / "grid" / "cells.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("path", sorted((CONF / "experiment").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes_and_says_how_to_run_it(path):
    load(f"experiment={path.relative_to(CONF / 'experiment').with_suffix('')}")
    head = path.read_text().split("\ndefaults")[0]
    assert "python -m simulations." in head or "flwr run" in head
