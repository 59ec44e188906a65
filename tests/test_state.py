"""What a node keeps: it comes back bit for bit, it is written whole or not at all, and a round can be repeated."""

from __future__ import annotations

import pytest
import torch

from clients.state import Drawer, StateError
from fl.adapter import digest

SOME = {"head.weight": torch.tensor([[1 / 3, -0.0], [torch.inf, -1e-42]]), "a.lora_b.weight": torch.zeros(0, 4), "turned": torch.arange(6.0).view(2, 3).T}


@pytest.fixture
def drawer(tmp_path) -> Drawer:
    return Drawer(str(tmp_path), "run", 0)


def at(value: float) -> dict[str, torch.Tensor]:
    return {"head.bias": torch.tensor([value])}


def test_what_is_kept_comes_back_bit_for_bit_beside_that_of_others(tmp_path):
    mine, other, earlier = Drawer(str(tmp_path), "run-1", 3), Drawer(str(tmp_path), "run-1", 4), Drawer(str(tmp_path), "run-0", 3)
    assert mine.folder == tmp_path / "run-1" / "client-003" and not tmp_path.joinpath("run-1").exists()
    mine.keep("personal", 1, SOME)
    round, found = mine.recall("personal", 9)
    assert round == 1 and digest(found) == digest(SOME) and set(found) == set(SOME)
    assert other.recall("personal", 9) is earlier.recall("personal", 9) is mine.recall("control", 9) is None
    assert [p.name for p in mine.folder.iterdir()] == ["personal-00001.safetensors"] and mine.folder.stat().st_mode & 0o77 == 0


def test_a_round_is_repeated_from_what_stood_before_it(drawer):
    for round in (1, 2, 5):
        drawer.keep("control", round, at(round))
    drawer.tidy(2)
    assert drawer.recall("control", 5)[0] == 5
    assert drawer.recall("control", 4)[0] == 2 and float(drawer.recall("control", 4)[1]["head.bias"]) == 2
    assert drawer.recall("control", 1) is None  # of what is past repeating nothing stays
    drawer.keep("control", 3, at(3))  # another attempt: round 5 of the first one is void
    assert drawer.recall("control", 9)[0] == 3 and len(list(drawer.folder.iterdir())) == 2
    drawer.keep("control", 4, at(4)), drawer.keep("lost", 1, at(1))
    drawer.tidy(0)
    assert len(list(drawer.folder.iterdir())) == 4
    drawer.tidy(9)
    assert sorted(p.name for p in drawer.folder.iterdir()) == ["control-00004.safetensors", "lost-00001.safetensors"]


def test_nothing_is_an_answer_too(drawer):
    assert Drawer("/nonexistent", "run", 0).recall("base", 7) is None
    drawer.keep("base", 7, {})
    assert drawer.recall("base", 7) == (7, {})


def test_a_write_that_fails_leaves_what_was_there(drawer, monkeypatch):
    drawer.keep("control", 1, at(1))

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("fl.durable.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        drawer.keep("control", 1, at(2))
    assert float(drawer.recall("control", 1)[1]["head.bias"]) == 1
    assert [p.name for p in drawer.folder.iterdir()] == ["control-00001.safetensors"]


def test_what_an_ended_process_left_half_written_is_cleared_away_and_what_a_living_one_writes_is_not(drawer):
    drawer.keep("lost", 1, at(1))
    dead, alive, other = (drawer.folder / f".{name}.part" for name in ("lost-00002.safetensors.999999999", "lost-00002.safetensors.1", "base-00002.safetensors.999999999"))
    for part in (dead, alive, other):
        part.write_bytes(b"half")
    drawer.keep("lost", 3, at(3))
    assert not dead.exists() and alive.exists() and other.exists()


def test_what_rounds_that_did_not_count_left_is_taken_back(drawer):
    for round in (1, 2, 3):
        drawer.keep("lost", round, at(round)), drawer.keep("received", round, at(round))
    drawer.rewind(1, "lost", "never")
    assert drawer.recall("lost", 9)[0] == 1 and sorted(drawer.listing()) == [("lost", 1), *(("received", r) for r in (1, 2, 3))]


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b"x" * len(b)], ids=["cut", "short", "empty", "other"])
def test_a_damaged_file_is_one_clear_line(drawer, spoil):
    drawer.keep("personal", 2, SOME)
    path = drawer.folder / "personal-00002.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StateError, match=f"state file {path} must be as it was written, but cannot be read .*; start the run anew") as caught:
        drawer.recall("personal", 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", ["", "..", "../up", "a/b", "A", "x" * 200])
def test_a_run_that_is_no_folders_name_keeps_nothing(tmp_path, run):
    for work in (lambda drawer: drawer.keep("x", 1, SOME), lambda drawer: drawer.recall("x", 1)):
        with pytest.raises(StateError, match="needs a run's name of a-z"):
            work(Drawer(str(tmp_path), run, 0))
    assert not list(tmp_path.iterdir())
