"""A client's own failure, as the server hears of it. In a deployment the answer is put together from words that are fixed in advance.

An error's text may hold a path, a value, a person's name or a class's: it stays in the machine's log. The server hears which part
failed, by which rule or in which settings: ``its pictures: data.root; its log says why``. In a simulation all is one person's,
and the answer is the text.
"""

from __future__ import annotations

import errno
import os
import sys
from functools import reduce
from pathlib import Path

from clients import echo, witness
from clients.policy import PLACES
from clients.state import StateError
from fl.config import Config, ConfigError, Node, OverrideError, setting_names
from fl.datasets import DataError
from fl.keys import KeyFileError
from fl.learn import TrainingError
from fl.models import WeightsError
from fl.wire.flat import WireError
from fl.wire.masks import SealError

PARTS: tuple[tuple[type[Exception], str, tuple[str, ...]], ...] = (  # the kind of an error, what failed, where it looks first
    (OverrideError, "overrides", ()),
    (ConfigError, "its config", ()),
    (KeyFileError, "its key", ("key",)),
    (DataError, "its pictures", ("own", "data.root")),
    (WeightsError, "its model", ("model.weights",)),
    (TrainingError, "its training", ("recipe",)),
    (StateError, "its state", ("state",)),
    (SealError, "the seal", ()),
    (WireError, "the message", ()),
    (OSError, "its files", ()),
)
EXPECTED = tuple(kind for kind, _, _ in PARTS)
NODE_NAMES = frozenset({"partition-id", "num-partitions", *Node.model_fields})
LINES = frozenset({echo.VIEWS, witness.RECORDS})
"""Texts of errors that are an answer as they stand."""
SIMULATIONS = ("ray", "flwr.simulation.app", "simulations.inprocess")


def simulated() -> bool:
    """Whether this process is one of a simulation, where server and clients are one person's."""
    return any(name in sys.modules for name in SIMULATIONS)


def says(error: Exception, config: Config | None) -> str:
    """One line for the server about ``error``, in a client with ``config`` (None: before there was one)."""
    if not simulated():
        return closed(error, config)
    if isinstance(error, EXPECTED):
        return str(error)
    return f"it failed inside ({type(error).__name__}: {' '.join(str(error).split())}); look at its log"


def closed(error: Exception, config: Config | None) -> str:
    """The line without a word of the error's text: all in it is fixed in advance."""
    if str(error) in LINES:
        return str(error)
    found = next(((name, usual) for kind, name, usual in PARTS if isinstance(error, kind)), None)
    if found is None:
        return "a fault inside; its log says why"
    part, usual = found
    rule = getattr(error, "rule", None)
    if rule in getattr(type(error), "RULES", ()):
        return f"{part}: {rule}"
    if isinstance(error, OSError):
        why = [os.strerror(error.errno)] if error.errno in errno.errorcode else []
        return ": ".join([part, *place_of(error.filename, config), *why]) + "; its log says why"
    settings = known(*getattr(error, "settings", ())) or in_use(usual, config)
    return ": ".join([part, *([", ".join(settings)] if settings else [])]) + "; its log says why"


def known(*settings: str) -> list[str]:
    """Each of the ``settings``, or what of its path is a setting's name; nothing of a name that no config has."""
    names, found = setting_names() | NODE_NAMES, []
    for setting in settings:
        parts = setting.split(".")
        paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found += [path for path in paths if path in names][:1]
    return list(dict.fromkeys(found))


def in_use(settings: tuple[str, ...], config: Config | None) -> list[str]:
    """Where pictures come from a folder of the client's own, that; else what else there is."""
    own = config is not None and config.own is not None
    return [s for s in settings if not (s == "data.root" and own or s == "own" and not own)]


def place_of(file: object, config: Config | None) -> list[str]:
    """The name of the setting in whose place ``file`` lies, the innermost; none where it lies elsewhere."""
    if config is None or not isinstance(file, (str, os.PathLike)):
        return []
    values = config.model_dump()
    places = {name: reduce(lambda tree, part: tree.get(part), name.split("."), values) for name in PLACES}
    where = {name: Path(place).expanduser() for name, place in places.items() if isinstance(place, str)}
    around = [name for name, place in where.items() if Path(file).is_relative_to(place)]
    return sorted(around, key=lambda name: len(where[name].parts))[-1:]
