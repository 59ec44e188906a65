"""Laws that every partition in conf/partition must hold, and what tells them apart."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from fl.config import CONF, ConfigError, build
from fl.datasets import DataError
from fl.datasets.partition import Split, dirichlet, iid, quantity, shards, split

EVERY = sorted(p.stem for p in (CONF / "partition").glob("*.yaml"))
LABELS, TESTS = torch.arange(200) % 10, torch.arange(53) % 10


def cut(name: str):
    return build(OmegaConf.to_container(OmegaConf.load(CONF / "partition" / f"{name}.yaml")))


def everything(parts: list[torch.Tensor]) -> list[int]:
    return sorted(torch.cat(parts).tolist())


def classes(indices: torch.Tensor) -> torch.Tensor:
    return torch.bincount(LABELS[indices], minlength=10)


def test_there_are_partitions_to_hold_to_the_laws():
    assert {"iid", "dirichlet", "shards", "quantity"} <= set(EVERY)


@pytest.mark.parametrize("clients", [1, 7, 53])
@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize("name", EVERY)
def test_parts_are_disjoint_cover_everything_and_leave_each_client_two_images(name, clients, validation):
    parts = split(cut(name), LABELS, TESTS, clients, 3, validation)
    assert everything(parts.train + parts.validation) == list(range(200))
    assert everything(parts.test) == list(range(53))
    assert min(map(len, parts.train)) >= 2 and min(map(len, parts.test)) >= 1
    assert all((len(held) > 0) == (validation > 0) for held in parts.validation)
    assert all(i.dtype == torch.int64 for lists in parts for i in lists)


@pytest.mark.parametrize("name", EVERY)
def test_a_split_is_a_function_of_its_seed(name):
    one, again, other = (split(cut(name), LABELS, TESTS, 5, seed, 0.1) for seed in (0, 0, 1))
    assert one.digest() == again.digest() != other.digest() and one.manifest() == again.manifest()
    assert one.manifest()["train"] != other.manifest()["train"] and one.manifest()["test"] != other.manifest()["test"]


def test_the_digest_sees_every_single_index():
    one = split(iid(), LABELS, TESTS, 5, 0, 0.1)
    for part in ("train", "validation", "test"):
        lists = [indices.clone() for indices in getattr(one, part)]
        lists[2][0] += 1
        assert one._replace(**{part: lists}).digest() != one.digest()


def test_the_held_out_share_is_what_was_asked_for():
    parts = split(iid(), LABELS, TESTS, 5, 0, 0.25)
    assert [len(i) for i in parts.train] == [30] * 5 and [len(i) for i in parts.validation] == [10] * 5
    assert [len(i) for i in split(iid(), LABELS, TESTS, 5, 0).validation] == [0] * 5


def test_iid_shares_are_equal_and_mixed():
    parts = split(iid(), LABELS, TESTS, 6, 0)
    assert sorted(len(i) for i in parts.train) == [33, 33, 33, 33, 34, 34]
    assert all((classes(i) > 0).sum() >= 8 for i in parts.train)


def test_dirichlet_tends_to_iid_as_alpha_grows_and_to_single_classes_as_it_shrinks():
    even, uneven = (split(dirichlet(alpha), LABELS, TESTS, 5, 0) for alpha in (1e6, 1e-3))
    assert all(torch.all((classes(i) - 4).abs() <= 1) for i in even.train)  # 20 of each class among 5
    owners = torch.stack([classes(i) for i in uneven.train])
    assert (owners.max(dim=0).values >= 17).all()


def test_shards_give_a_client_so_many_classes():
    parts = split(shards(2), LABELS, TESTS, 10, 0)  # 20 shards of 10 images, each inside one class
    assert [len(i) for i in parts.train] == [20] * 10
    assert all((classes(i) > 0).sum() <= 2 for i in parts.train)
    assert any((classes(i) > 0).sum() == 2 for i in parts.train)


def test_quantity_skews_sizes_and_not_classes():
    parts = split(quantity(0.5), torch.arange(20_000) % 10, TESTS, 5, 0)
    sizes = [len(i) for i in parts.train]
    assert max(sizes) > 4 * min(sizes)
    largest = max(parts.train, key=len)
    share = torch.bincount(largest % 10, minlength=10) / len(largest)
    assert (share - 0.1).abs().max() < 0.02


def test_a_client_is_tested_on_what_it_is_like():
    tests = torch.arange(1000) % 10
    parts = split(dirichlet(0.3), torch.arange(5000) % 10, tests, 5, 0)
    trained, tested = (torch.stack([torch.bincount(i % 10, minlength=10) for i in lists]) for lists in (parts.train, parts.test))
    assert ((trained / 5 - tested).abs() <= 1.5).all()  # a fifth of each class's images, to rounding
    unseen = split(iid(), torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.int64), 5, 0)
    assert [len(i) for i in unseen.test] == [10] * 5


@pytest.mark.parametrize("name", EVERY)
def test_scarce_images_are_still_two_for_each_client(name):
    parts = split(cut(name), LABELS[:21], TESTS, 10, 0)
    assert sorted(len(i) for i in parts.train) == [2] * 9 + [3] and everything(parts.train) == list(range(21))


@pytest.mark.parametrize(
    ("train", "test", "validation"), [(9, 53, 0.0), (14, 53, 0.1), (200, 4, 0.0)], ids=["train", "validation", "test"]
)
def test_too_few_images_are_one_line_that_says_how_many_it_takes(train, test, validation):
    with pytest.raises(DataError, match="5 clients need at least") as caught:
        split(iid(), LABELS[:train], TESTS[:test], 5, 0, validation)
    assert f"got {train} and {test}" in str(caught.value) and "\n" not in str(caught.value)
    split(iid(), LABELS[: max(train + 1, 10)], TESTS[: max(test, 5)], 5, 0, validation)  # one more is enough


def test_the_manifest_is_saved_and_reads_back(tmp_path):
    parts = split(iid(), LABELS, TESTS, 3, 0, 0.1)
    parts.save(tmp_path / "split.json")
    read = json.loads((tmp_path / "split.json").read_text())
    assert read.pop("digest") == parts.digest()
    assert Split(**{part: [torch.tensor(i) for i in lists] for part, lists in read.items()}).digest() == parts.digest()


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_alpha_must_be_positive(name):
    with pytest.raises(ConfigError, match="alpha"):
        build({"_target_": f"fl.datasets.partition.{name}", "alpha": 0})
