"""A released model answers for a folder as the federation's did, to plain and to encrypted pictures, and to no other key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from clients import predict as predicting
from clients.predict import PredictError, encrypt_folder, predict
from fl import keys
from fl.config import build, load
from fl.datasets.folder import image_folder, read_picture
from fl.export import export
from fl.export.folder import ExportError, open_run
from fl.journal import Journal
from fl.randomness import generator
from simulations import loop

VIT = "model=vit_tiny model.name=vit_tiny_patch16_224 model.image=32 model.patch=8 model.weights=none +model.embed_dim=32 +model.depth=2 +model.num_heads=2"
EASY = "clients=2 rounds=3 recipe.batch=8 precision=float32 step=plain codec=float32 personal=false diagnostics=0"
CLASSES = ("blue", "green", "red")


class Site(NamedTuple):
    """A federation that is over: two keys, its pictures, its runs by start."""

    home: Path
    key: Path
    other: Path
    runs: dict[str, Path]

    @property
    def test(self) -> Path:
        return self.home / "data" / "test"

    def accuracy(self, start: str) -> float:
        return json.loads((self.runs[start] / "summary.json").read_text())["accuracy"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """Pictures of 40 x 36, one of them grey and one that is none, whose brightest channel is mostly their class."""
    home = tmp_path_factory.mktemp("site")
    keys.create(home / "key"), keys.create(home / "other")
    stream = generator(0, "pictures")
    for part, number in (("train", 40), ("test", 20)):
        for label, name in enumerate(CLASSES):
            (home / "data" / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(0, 200, (36, 40, 3), generator=stream, dtype=torch.uint8)
                pixels[..., 2 - label] += torch.randint(-2, 30, (1,), generator=stream).clamp(min=0).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(home / "data" / part / name / f"{i:02}.png")
    (home / "data" / "test" / "red" / "notes.txt").write_text("no picture")
    Image.new("L", (50, 50), 90).save(home / "data" / "test" / "red" / "grey.jpg")
    runs = {}
    for name, change in (("keyed", ""), ("public", "start=public"), ("plain", "cipher=plain"), ("flora", "strategy=flora")):
        config = load(f"{VIT} {EASY} data=folder data.root={home}/data key={home}/key output={home} state={home}/state {change}")
        loop.run(config, Journal(config, name))
        runs[name] = home / name
    return Site(home, home / "key", home / "other", runs)


@pytest.fixture(scope="module")
def encrypted(site) -> Path:
    """The test pictures as encrypted files."""
    record = encrypt_folder(site.runs["keyed"], site.test, site.home / "encrypted", site.key)
    assert record["images"] == 61 and record["skipped"] == 1
    return site.home / "encrypted"


def same(a: dict, b: dict, names: bool = True) -> None:
    """Both say the same of each picture."""
    for one, other in zip(a["rows"], b["rows"], strict=True):
        assert other["file"] == one["file"] or not names
        assert one["class"] == other["class"] and abs(one["probability"] - other["probability"]) < 1e-5


def test_a_keyed_run_answers_as_its_clients_did_to_plain_and_to_encrypted_pictures(site, encrypted):
    run, accuracy = site.runs["keyed"], site.accuracy("keyed")
    assert 0.45 < accuracy < 1  # neither chance nor certainty, so that equality says something
    plain, in_memory, stored = predict(run, site.test), predict(run, site.test, site.key), predict(run, encrypted, site.key, encrypted=True)
    for answer, reads in ((plain, "plain"), (in_memory, "encrypted"), (stored, "encrypted")):
        assert answer["accuracy"] == accuracy and answer["reads"] == reads
        assert answer["images"] == 61 and answer["correct"] == round(61 * accuracy)
    assert plain["skipped"] == 1 and stored["skipped"] == 0
    same(plain, in_memory), same(plain, stored, names=False)
    assert json.loads(json.dumps(plain)) == plain


def test_a_public_run_reads_encrypted_pictures_alone(site, encrypted):
    run, accuracy = site.runs["public"], site.accuracy("public")
    stored, in_memory = predict(run, encrypted, encrypted=True), predict(run, site.test, site.key)
    assert stored["accuracy"] == in_memory["accuracy"] == accuracy and stored["reads"] == in_memory["reads"] == "encrypted"
    same(stored, in_memory, names=False)
    with pytest.raises(PredictError, match="reads plain pictures with the key alone"):
        predict(run, site.test)


def test_a_plain_run_needs_no_key_and_encrypts_nothing(site, tmp_path):
    answer = predict(site.runs["plain"], site.test)
    assert answer["accuracy"] == site.accuracy("plain") and answer["reads"] == "plain"
    same(answer, predict(site.runs["plain"], site.test, encrypted=True))
    with pytest.raises(PredictError, match="nothing to encrypt with"):
        encrypt_folder(site.runs["plain"], site.test, tmp_path / "out", site.key)


def test_a_run_whose_base_changed_answers_with_that_base(site):
    assert open_run(site.runs["flora"]).adapter.base
    assert predict(site.runs["flora"], site.test, site.key)["accuracy"] == site.accuracy("flora")


def test_another_key_is_refused_by_its_fingerprint(site, encrypted, tmp_path):
    run, mine, other = site.runs["keyed"], *(keys.read(path).fingerprint for path in (site.key, site.other))
    for ask in (
        lambda: predict(run, site.test, site.other),
        lambda: predict(run, encrypted, site.other, encrypted=True),
        lambda: encrypt_folder(run, site.test, tmp_path / "out", site.other),
    ):
        with pytest.raises(PredictError, match=f"with fingerprint {mine}, got {other}"):
            ask()
    assert not (tmp_path / "out").exists()
    with pytest.raises(PredictError, match=f"encrypted pictures are read with the key alone .fingerprint {mine}"):
        predict(run, encrypted, encrypted=True)


def test_encrypted_files_are_the_cipher_of_scaled_pictures(site, encrypted):
    way = open_run(site.runs["keyed"]).reading
    cipher = build(way.cipher, key=keys.read(site.key), block=way.block)
    scaled = image_folder(32, str(site.home / "data")).test.images
    files = [path for name in CLASSES for path in sorted((encrypted / name).glob("*"))]
    stored = torch.stack([read_picture(path, None).image for path in files])
    assert torch.equal(cipher.decrypt(stored), scaled) and not torch.equal(stored, scaled)


def test_an_export_predicts_as_its_run_does(site, encrypted, tmp_path):
    for start, images, given in (("keyed", site.test, {}), ("keyed", encrypted, {"key": site.key, "encrypted": True}), ("public", encrypted, {"encrypted": True})):
        out = tmp_path / start
        if not out.exists():
            export(site.runs[start], out, "timm")
        answer = predict(out, images, **given)
        assert answer["accuracy"] == site.accuracy(start)
        same(answer, predict(site.runs[start], images, **given))
    with pytest.raises(PredictError, match="with fingerprint"):
        predict(tmp_path / "keyed", site.test, site.other)
    export(site.runs["keyed"], tmp_path / "peft", "peft")
    with pytest.raises(ExportError, match="got kind=peft"):
        predict(tmp_path / "peft", site.test)


def test_pictures_that_do_not_lie_by_class_are_classified_without_an_accuracy(site, tmp_path):
    whole = {row["file"]: row["class"] for row in predict(site.runs["keyed"], site.test)["rows"]}
    shutil.copytree(site.test / "red", tmp_path / "flat")
    flat = predict(site.runs["keyed"], tmp_path / "flat")
    assert "accuracy" not in flat and {f"red/{row['file']}": row["class"] for row in flat["rows"]}.items() <= whole.items()
    shutil.copytree(site.test, tmp_path / "more")
    (tmp_path / "more" / "red").rename(tmp_path / "more" / "wasp")
    assert "accuracy" not in predict(site.runs["keyed"], tmp_path / "more")


def test_many_pictures_are_read_a_batch_at_a_time(site, monkeypatch):
    whole = predict(site.runs["keyed"], site.test)
    monkeypatch.setattr(predicting, "BATCH", 7)
    parts = predict(site.runs["keyed"], site.test)
    same(whole, parts)
    assert parts["accuracy"] == whole["accuracy"] and parts["skipped"] == 1


def test_encrypted_pictures_that_were_scaled_or_compressed_are_refused(site, encrypted, tmp_path):
    one = Image.open(next((encrypted / "red").glob("*.png")))
    for folder, name, picture in (("a", "x.png", one.resize((40, 40))), ("b", "x.jpg", one)):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / name)
        with pytest.raises(PredictError, match="must be PNG files of 32 x 32, got .*x"):
            predict(site.runs["keyed"], tmp_path / folder, site.key, encrypted=True)


def test_a_folder_without_pictures_and_one_that_is_there_are_refused(site, tmp_path):
    with pytest.raises(PredictError, match="which is none"):
        predict(site.runs["keyed"], tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PredictError, match="1 that cannot"):
        predict(site.runs["keyed"], tmp_path)
    with pytest.raises(PredictError, match="device must be one that torch has, got 'cpo'"):
        predict(site.runs["keyed"], site.test, device="cpo")
    with pytest.raises(PredictError, match="need a new folder"):
        encrypt_folder(site.runs["keyed"], site.test, tmp_path, site.key)
    with pytest.raises(ExportError, match="a run's folder"):
        predict(tmp_path, site.test)


def test_predicting_writes_nothing(site, encrypted):
    before = {p: p.read_bytes() for p in site.home.rglob("*") if p.is_file()}
    predict(site.runs["keyed"], encrypted, site.key, encrypted=True)
    assert {p: p.read_bytes() for p in site.home.rglob("*") if p.is_file()} == before
