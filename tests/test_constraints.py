"""The two lists of releases in .ci pin every library of the extras, and the ranges of pyproject.toml say no more than they do."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("oldest", "newest")


def ranges() -> dict[str, Requirement]:
    """What the extras ask for, by name; an extra that takes in another adds nothing of its own."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = [Requirement(words) for extra in extras.values() for words in extra]
    specified: dict[str, Requirement] = {}
    for r in found:
        if r.name != "veilora":
            assert r.specifier == specified.setdefault(r.name, r).specifier, f"{r.name} must have one range"
    return specified


def pins(which: str) -> dict[str, Version]:
    """The releases of a list; every line of it that is no comment is ``name==version``."""
    lines = [line for line in (ROOT / ".ci" / f"{which}.txt").read_text().splitlines() if line and not line.startswith("#")]
    named = dict(line.split("==") for line in lines)
    assert len(named) == len(lines), "a library must be pinned once"
    return {name: Version(release) for name, release in named.items()}


@pytest.mark.parametrize("which", LISTS)
def test_a_list_pins_the_libraries_of_the_extras_and_nothing_else(which):
    assert pins(which).keys() == ranges().keys()


@pytest.mark.parametrize("which", LISTS)
def test_a_list_names_no_host_and_no_option(which):
    for line in (ROOT / ".ci" / f"{which}.txt").read_text().splitlines():
        assert not line.startswith("-") and "://" not in line and "@" not in line


def test_a_range_begins_with_the_oldest_release_and_ends_with_the_series_of_the_newest():
    oldest, newest = pins("oldest"), pins("newest")
    for name, r in ranges().items():
        assert oldest[name] <= newest[name] and r.specifier.contains(oldest[name]) and r.specifier.contains(newest[name]), name
        lower = [Version(s.version) for s in r.specifier if s.operator in (">=", "==")]
        assert lower == [oldest[name]], f"{name} was tried from {oldest[name]} on, and the range must say so"
        major, minor, *_ = newest[name].release
        beyond = f"0.{minor + 1}" if major == 0 else f"{major + 1}"
        assert not r.specifier.contains(beyond), f"{name} was tried up to {newest[name]}, and the range must leave out {beyond}"
