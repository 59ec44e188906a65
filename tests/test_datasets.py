"""Every source gives the right pictures under the right labels, and says what it had to convert or leave out."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from fl.config import build, load
from fl.datasets import DataError, Examples
from fl.datasets.cifar import cifar10, cifar100
from fl.datasets.demo import CLASSES, PUBLIC, demo, draw
from fl.datasets.folder import image_folder
from fl.datasets.images import augment, resize, save_rows
from fl.randomness import generator

ROWS = 12


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """CIFAR in torchvision's files: red tells the row, green the column (+ 100), blue the image's number; label i % 3."""
    row, column = np.mgrid[0:32, 0:32]

    def write(source, part, label, names):
        planes = [np.concatenate([row.ravel(), 100 + column.ravel(), np.full(1024, i)]) for i in range(ROWS)]
        files = {
            "train": {"data": np.stack(planes).astype(np.uint8), label: [i % 3 for i in range(ROWS)]},
            "test": {"data": np.stack(planes[:4]).astype(np.uint8), label: [2, 1, 0, 2]},
            "meta": {names: ["ant", "bee", "cat"]},
        }
        folder = tmp_path / part
        folder.mkdir()
        sums = {}
        for name, content in files.items():
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(source, "meta", {"filename": "meta", "key": names, "md5": sums["meta"]})

    write(CIFAR10, "cifar-10-batches-py", "labels", "label_names")
    write(CIFAR100, "cifar-100-python", "fine_labels", "fine_label_names")
    return tmp_path


@pytest.mark.parametrize("source", [cifar10, cifar100])
def test_cifars_planar_rows_become_the_right_picture(fake_cifar, source):
    data = source(32, str(fake_cifar))
    images, labels = data.train
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    assert images.dtype == torch.uint8 and images.shape == (ROWS, 3, 32, 32) and labels.dtype == torch.int64
    for i in range(ROWS):
        assert torch.equal(images[i].long(), torch.stack([row, 100 + column, torch.full((32, 32), i)]))
    assert labels.tolist() == [i % 3 for i in range(ROWS)] and data.test.labels.tolist() == [2, 1, 0, 2]
    assert data.classes == ("ant", "bee", "cat") and data.faults == {}


def test_a_part_of_cifar_is_always_the_same_part_with_its_labels(fake_cifar):
    first, again = (cifar10(32, str(fake_cifar), train=5, test=2) for _ in range(2))
    numbers = first.train.images[:, 2, 0, 0].long()
    assert len(numbers) == 5 and len(first.test.labels) == 2
    assert numbers.tolist() == sorted(set(numbers.tolist())) != list(range(5))
    assert torch.equal(first.train.labels, numbers % 3) and torch.equal(first.train.images, again.train.images)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_cifar_that_is_missing_or_damaged_is_one_line_that_names_data_root(fake_cifar, damage):
    file = fake_cifar / "cifar-10-batches-py" / "train"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="data.root") as caught:
        cifar10(32, str(fake_cifar if damage == "changed" else fake_cifar / "nowhere"))
    assert "\n" not in str(caught.value) and str(fake_cifar) in str(caught.value)


def picture(path, mode="RGB", size=(20, 20), colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes; in ``train/bee`` one of everything that people keep in such folders."""
    bee = tmp_path / "train" / "bee"
    picture(bee / "grey.png", "L", colour=200)
    picture(bee / "palette.gif", "P")
    picture(bee / "clear.png", "RGBA", colour=(9, 8, 7, 128))
    picture(bee / "odd.png", size=(37, 21), colour=(1, 2, 3))
    (bee / "empty.png").touch()
    (bee / "notes.txt").write_text("not a picture")
    (bee / ".hidden.png").touch()
    for name, mode in (("cut.png", "RGB"), ("grey_cut.png", "L")):
        Image.effect_noise((64, 64), 90).convert(mode).save(bee / name)
        (bee / name).write_bytes((bee / name).read_bytes()[:1500])
    wide = Image.new("RGB", (30, 10), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    (tmp_path / "train" / "ant").mkdir()
    wide.save(tmp_path / "train" / "ant" / "wide.png")
    picture(tmp_path / "test" / "bee" / "a.png", "L", colour=50)
    (tmp_path / "test" / "ant").mkdir()
    return tmp_path


def test_a_folder_converts_what_it_can_and_counts_what_it_skips(folder):
    data = image_folder(16, str(folder))
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 1, 1, 1, 1] and data.test.labels.tolist() == [1]
    assert data.train.images.shape == (5, 3, 16, 16) and data.train.images.dtype == torch.uint8
    clear, grey, odd = data.train.images[[1, 2, 3]]  # in the order of the files' names
    assert (clear == torch.tensor([9, 8, 7])[:, None, None]).all() and (grey == 200).all()
    assert (odd == torch.tensor([1, 2, 3])[:, None, None]).all()
    assert data.faults.pop("train skipped") == 4  # empty, text, cut and cut grey
    assert data.faults.pop("test converted") == 1
    assert data.faults.pop("train converted") == 3  # and not the cut grey one, which was skipped
    assert data.faults == {}


def test_a_picture_that_is_not_square_keeps_its_centre(folder):
    middle = image_folder(8, str(folder)).train.images[0]
    assert (middle[1] > 200).all() and (middle[[0, 2]] < 60).all()


def test_a_test_class_that_training_lacks_is_refused_by_name(folder):
    picture(folder / "test" / "wasp" / "a.png")
    with pytest.raises(DataError, match=r"\['wasp'\]"):
        image_folder(16, str(folder))


def test_a_folder_without_its_parts_or_pictures_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="data.root"):
        image_folder(16, str(tmp_path / "nowhere"))
    (folder / "test" / "bee" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="test/ must hold pictures"):
        image_folder(16, str(folder))


def test_the_demo_is_drawn_from_its_seed_alone():
    one, again, other = demo(32, 40, 40), demo(64, 40, 40), demo(32, 40, 40, seed=1)
    assert one.train.images.dtype == torch.uint8 and one.train.images.shape == (40, 3, 32, 32)
    assert torch.equal(one.train.images, again.train.images) and torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert not torch.equal(one.train.images, one.test.images)


def test_the_demos_labels_count_through_classes_that_the_backbone_never_saw():
    data = build(load("data=demo data.train=25 data.test=10").data, image=32)
    assert data.train.labels.tolist() == [i % len(data.classes) for i in range(25)] and data.faults == {}
    assert data.classes == CLASSES and len(set(CLASSES)) == 10 and not set(CLASSES) & set(PUBLIC)
    mean = torch.stack([draw((kind,), 8, generator(0, "same")).images.float().mean() for kind in CLASSES])
    assert len(set(mean.tolist())) == 10  # under the same chances each kind is another picture


def test_examples_are_taken_in_the_order_asked():
    taken = Examples(torch.arange(4).view(4, 1, 1, 1), torch.tensor([5, 6, 7, 8])).at(torch.tensor([2, 0]))
    assert taken.images.flatten().tolist() == [2, 0] and taken.labels.tolist() == [7, 5]


def test_augmentation_gives_every_shift_and_flip_of_each_picture_and_nothing_else():
    x = torch.randint(1, 256, (1, 3, 8, 8), generator=generator(0, "x"), dtype=torch.uint8)  # reaches 1 pixel
    legal = set()
    for flipped in (x, x.flip(3)):
        frame = torch.zeros(3, 10, 10, dtype=torch.uint8)
        frame[:, 1:9, 1:9] = flipped[0]
        legal |= {frame[:, i : i + 8, j : j + 8].contiguous().numpy().tobytes() for i in range(3) for j in range(3)}
    drawn = augment(x.expand(600, -1, -1, -1), generator(0, "augment"))
    assert drawn.shape == (600, 3, 8, 8) and drawn.dtype == torch.uint8 and drawn.is_contiguous()
    counts = [sum(d.numpy().tobytes() == pattern for d in drawn) for pattern in legal]
    assert len(legal) == 18 and sum(counts) == 600 and min(counts) > 10  # the untouched picture among them


def test_augmentation_is_drawn_from_its_stream_alone():
    x = torch.randint(0, 256, (4, 3, 16, 24), generator=generator(0, "x"), dtype=torch.uint8)
    before = x.clone()
    one, again, other = (augment(x, generator(s, "augment")) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(x, before) and one.shape == x.shape


def test_resizing_leaves_what_fits_and_scales_the_rest():
    x = torch.full((2, 3, 8, 12), 77, dtype=torch.uint8)
    assert torch.equal(resize(x[..., :8], 8), x[..., :8])
    for side in (8, 12, 16):
        assert torch.equal(resize(x, side), torch.full((2, 3, side, side), 77, dtype=torch.uint8))
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1, 3, 32, 32)
    assert (resize(ramp, 64)[0, 0, 0].int().diff() >= 0).all() and (resize(ramp, 64)[0, :, 0] == resize(ramp, 64)[0, :, 63]).all()


def test_a_sheet_of_pictures_shows_each_in_its_place(tmp_path):
    rows = [torch.randint(0, 256, (2, 3, 4, 4), generator=generator(i, "x"), dtype=torch.uint8) for i in range(2)]
    save_rows(rows, tmp_path / "sheet.png", zoom=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16, 16, 3)
    assert (sheet[8:16:2, 0:8:2] == rows[1][0].permute(1, 2, 0).numpy()).all()
