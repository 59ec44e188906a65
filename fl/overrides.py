"""Overrides are data, on every machine: each word is judged before Hydra reads it, and none can name code or a file.

Hydra's own grammar has functions, interpolations that read the environment, and settings that add folders to search. A word here
is ``NAME=VALUE``, ``+NAME=VALUE``, ``++NAME=VALUE``, ``~NAME`` or ``+codec@codecs.GROUP=CODEC``, and VALUE is a number, a text, a
list or a mapping of those.
"""

from __future__ import annotations

import difflib
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fl.adapter import GROUPS

CONF = Path(__file__).resolve().parents[1] / "conf"
LONGEST, DEEPEST = 16_384, 8    # characters of all words; lists and mappings in one another
WORD = re.compile(r"(\+{1,2}|~|)([^=]*)(=(.*))?", re.DOTALL)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9][A-Za-z0-9_]*)*")
CODEC = re.compile(rf"codec@(codecs\.({'|'.join(GROUPS)}))")
QUOTED = re.compile(r"""'[^'"]*'|"[^'"]*\"""")


class ConfigError(ValueError):
    """A config that cannot run: one line that says what must hold, what was got and what to do.

    ``settings`` are the names of those concerned. Other machines may hear them, but not the line: it may hold a value.
    """

    def __init__(self, line: str, *settings: str) -> None:
        super().__init__(line)
        self.settings = settings


class OverrideError(ConfigError):
    """A word that is no override. ``rule``, one of ``RULES``, says why without the word."""

    RULES = frozenset(
        "length shell character interpolation flag form hydra builder package group quotes function nesting sweep option".split()
    )

    def __init__(self, line: str, rule: str = "form") -> None:
        super().__init__(line)
        self.rule = rule


class Word(NamedTuple):
    """One override: the ``name`` of the setting that it sets, its ``value``, and the ``text`` that Hydra is given."""

    name: str
    value: Any
    text: str


@lru_cache(maxsize=64)
def words(text: str) -> tuple[Word, ...]:
    """The overrides in ``text``, which reads like a shell's command line. Raises OverrideError for the first that is none."""
    if len(text) > LONGEST:
        raise OverrideError(f"overrides must have at most {LONGEST} characters, got {len(text)}; leave some out", "length")
    try:
        typed = shlex.split(text)
    except ValueError as error:
        raise OverrideError(f"overrides must read like a shell command line, got {text!r}: {error}", "shell") from None
    return tuple(word(one) for one in typed)


def word(typed: str) -> Word:
    """One override, judged. Raises OverrideError."""
    if not typed.isprintable() or "\\" in typed:
        raise OverrideError(f"an override must have characters that can be printed and no backslash, got {typed!r}", "character")
    if "$" in typed:
        raise OverrideError(f"an override must give its value as it is, without $, got {typed!r}", "interpolation")
    if typed.startswith("-"):
        raise OverrideError(f"overrides must be NAME=VALUE, and no flags, got {typed!r}", "flag")
    sign, name, given, value = WORD.fullmatch(typed).groups()
    setting, value = _name(typed, sign, name), _value(typed, value or "")
    if given is None and sign != "~":
        raise OverrideError(f"an override must be NAME=VALUE, got {typed!r}", "form")
    text = sign + name + ("" if given is None else f"={value}")
    try:
        read = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise OverrideError(f"overrides must be as Hydra reads them, got {typed!r}: {' '.join(str(error).split())}"[:300], "form") from None
    if read.is_sweep_override():
        raise OverrideError(f"a run has one value of each setting, got {typed!r}; put lists in brackets, or run a grid", "sweep")
    if f"{read.key_or_group}@{read.package}".removesuffix("@None") != name:
        raise OverrideError(f"an override must be NAME=VALUE, got {typed!r}", "form")
    found = Word(setting, read.value(), text)
    for part in _parts(found.value):
        if part is not None and not isinstance(part, (str, int, float)):
            raise OverrideError(f"an override's value must be numbers, texts, lists and mappings, got {typed!r}", "function")
    _option(name.partition("@")[0], found.value)
    return found


def _name(typed: str, sign: str, name: str) -> str:
    """The setting that ``name`` means."""
    if name.lower().startswith("hydra"):
        raise OverrideError(f"an override must be of this project's settings, and none of Hydra's own, got {typed!r}", "hydra")
    if any(part.startswith("_") for part in re.split(r"[./@]", name)):
        raise OverrideError(f"a builder must be chosen by its group, as in cipher=plain, got {typed!r}", "builder")
    if "@" in name:
        codec = CODEC.fullmatch(name)
        if sign != "+" or not codec:
            says = f"a group must go where it belongs, but for +codec@codecs.GROUP=CODEC with GROUP of {'|'.join(GROUPS)}, got {typed!r}"
            raise OverrideError(says, "package")
        return codec[1]
    if "/" in name:
        raise OverrideError(f"an option must be chosen by its group's name alone, as in experiment=demo/keyed, got {typed!r}", "group")
    if not NAME.fullmatch(name):
        raise OverrideError(f"a setting's name must be letters, digits, _ and dots, got {typed!r}", "form")
    return name


def _value(typed: str, value: str) -> str:
    """``value`` for Hydra: a place, which begins with / or ~, in quotes."""
    if value.startswith(("/", "~")):
        if "'" in value and '"' in value:
            raise OverrideError(f"a place must have no quotes of both kinds, got {typed!r}", "quotes")
        mark = '"' if "'" in value else "'"
        return f"{mark}{value}{mark}"
    bare = QUOTED.sub("", value)
    if set("'\"") & set(bare):
        raise OverrideError(f"quotes must end, with none inside, got {typed!r}", "quotes")
    if set("()") & set(bare):
        raise OverrideError(f"a value must be data, and no function's call, got {typed!r}; put a text in quotes", "function")
    if bare.count("[") + bare.count("{") > DEEPEST:
        raise OverrideError(f"a value must have at most {DEEPEST} lists and mappings, got {typed!r}"[:200], "nesting")
    return value


def _parts(value: Any) -> Iterator[Any]:
    """All that is in a ``value`` but its lists and mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key).startswith("_"):
                raise OverrideError(f"a builder must be chosen by its group, as in cipher=plain, got {str(key)!r} in a mapping", "builder")
            yield from _parts(key)
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)
    else:
        yield value


@lru_cache(maxsize=64)
def options(group: str) -> tuple[str, ...]:
    """The names of a group's YAML files, without their ending; none where there is no such group."""
    folder = CONF / group
    return tuple(sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("**/*.yaml")))


def groups() -> list[str]:
    """The groups of options."""
    return sorted(p.name for p in CONF.iterdir() if p.is_dir())


def _option(group: str, value: Any) -> None:
    """Raise OverrideError, with the nearest name that exists, unless ``group`` is none or ``value`` names one of its options."""
    if group not in groups():
        return
    for name in (n for n in _parts(value) if n is not None):
        if name not in options(group):
            near = difflib.get_close_matches(str(name), options(group), 1)
            raise OverrideError(f"{group}={name} does not exist{near_miss(near) or '; there are: ' + ', '.join(options(group))}", "option")


def near_miss(near: list[str]) -> str:
    """The question whether the nearest name was meant."""
    return f"; did you mean {near[0]!r}?" if near else ""
