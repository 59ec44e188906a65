"""A partition folder under another image key: the same pictures, whole or not at all, wherever it is broken off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_simulation import home, settings  # noqa: F401

from clients import local, partition
from fl import keys
from fl.config import load
from fl.datasets import DataError, own
from simulations import veilora


@pytest.fixture
def place(home, tmp_path) -> Path:
    """A folder that is encrypted with ``old``, beside it the key ``new``."""
    shutil.copy(home / "key", tmp_path / "old")
    keys.create(tmp_path / "new")
    partition.write(load(settings(home, tmp_path, f"key={tmp_path / 'old'}")), 0, 3, tmp_path / "mine", encrypt=True)
    return tmp_path / "mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_it_is_as_if_it_had_been_written_with_the_new_key(home, place, tmp_path):
    assert veilora.main(["key", "reencrypt", str(place), "--old", str(tmp_path / "old"), "--new", str(tmp_path / "new")]) == 0
    config = load(settings(home, tmp_path, f"key={tmp_path / 'new'}"))
    partition.write(config, 0, 3, tmp_path / "afresh", encrypt=True)
    assert contents(place) == contents(tmp_path / "afresh") and place.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in place.iterdir()} == {0o600}
    hidden = local.open_client(config.model_copy(update={"own": str(place)}), 0, 3)
    assert torch.equal(hidden.plain.images, local.open_client(config, 0, 3).plain.images)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_another_key_and_a_folder_that_is_not_encrypted_are_refused_and_left_alone(home, place, tmp_path):
    keys.create(tmp_path / "third")
    before = contents(place)
    with pytest.raises(DataError, match="must be encrypted with --old, key [0-9a-f]{16}, but is encrypted with key [0-9a-f]{16}; name the key"):
        partition.reencrypt(place, tmp_path / "third", tmp_path / "new")
    partition.write(load(settings(home, tmp_path)), 0, 3, tmp_path / "plain")
    with pytest.raises(DataError, match="but is encrypted not at all"):
        partition.reencrypt(tmp_path / "plain", tmp_path / "old", tmp_path / "new")
    assert contents(place) == before


@pytest.mark.parametrize("at", ["store", "first rename", "between the renames", "removal"])
def test_broken_off_anywhere_it_goes_on(place, tmp_path, monkeypatch, at):
    class Off(BaseException):
        """A power cut."""

    calls, rename, remove = [], Path.rename, shutil.rmtree

    def renamed(self, target):
        calls.append(target)
        if len(calls) == {"first rename": 1, "between the renames": 2}.get(at):
            raise Off
        return rename(self, target)

    def removed(path, **more):
        if len(calls) == 2:
            raise Off
        return remove(path, **more)

    def digest(path):
        if ".fresh" in str(path):
            raise Off
        return real(path)

    real = own._sha256
    before = {name: images for name, (images, _) in own.read(place)[1].items()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        if at == "removal":
            patch.setattr(shutil, "rmtree", removed)
        if at == "store":
            patch.setattr(own, "_sha256", digest)
        with pytest.raises(Off):
            partition.reencrypt(place, tmp_path / "old", tmp_path / "new")
    whole = [p for p in (place, tmp_path / ".mine.before") if p.exists()]
    assert whole and own.read(whole[0]), "at every moment one folder is whole"
    found = partition.reencrypt(place, tmp_path / "old", tmp_path / "new")
    assert found["encrypted"]["key"] == keys.read(tmp_path / "new").fingerprint
    facts, parts = own.read(place)
    assert facts.encrypted.key == keys.read(tmp_path / "new").fingerprint
    assert not torch.equal(parts["train"].images, before["train"]) and not [p for p in tmp_path.iterdir() if p.name.startswith(".mine")]
