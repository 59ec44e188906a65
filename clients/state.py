"""What a node keeps from one round to the next: named tensors in a folder of its own, for one run and one client.

    <state>/<run>/client-003/<what>-00007.safetensors        as it stood after round 7

A process may end after any message, so nothing that outlives a round lives in one. The round is in the name: who asks for
what stood before round 8 gets that, also when round 8 was begun, written and broken off. Tensors are in plain order: the
patch embedding in cipher order, beside the public one, shows the key.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fl.adapter import Adapter


class StateError(RuntimeError):
    """State that cannot be kept or read back; one line that says what to do."""


def drawer(state: str, run: str, client: int) -> Path:
    """The folder of one client in one run; nothing is touched. Raises StateError when ``run`` is no name for a folder."""
    if not re.fullmatch(r"[a-z0-9_-]{1,128}", run):
        raise StateError(f"what is kept between rounds needs a run's name of a-z, 0-9, _ and -, got {run[:60]!r}")
    return Path(state).expanduser() / run / f"client-{client:03}"


def keep(folder: Path, what: str, round: int, tensors: Adapter, last: int = 2) -> None:
    """Write ``what`` as it stands after ``round``, whole or not at all.

    Of those of earlier rounds ``last - 1`` stay, for a round that is to be repeated; of later ones, which an attempt that
    was broken off left behind, none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, what, round)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync(folder)
    kept = _rounds(folder, what)
    for old in kept:
        if old > round or old not in [r for r in kept if r <= round][-last:]:
            _path(folder, what, old).unlink()


def recall(folder: Path, what: str, upto: int) -> tuple[int, Adapter] | None:
    """The newest ``what`` that stood after a round of at most ``upto``, and that round; None where there is none.

    Raises StateError for a file that cannot be read.
    """
    rounds = [r for r in _rounds(folder, what) if r <= upto]
    if not rounds:
        return None
    path = _path(folder, what, rounds[-1])
    try:
        return rounds[-1], load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise StateError(f"state file {path} must be as it was written, but cannot be read ({error}); start the run anew") from None


def _path(folder: Path, what: str, round: int) -> Path:
    return folder / f"{what}-{round:05}.safetensors"


def _rounds(folder: Path, what: str) -> list[int]:
    found = (re.fullmatch(rf"{re.escape(what)}-(\d+)\.safetensors", p.name) for p in folder.glob(f"{what}-*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def _sync(folder: Path) -> None:
    """Make the renaming itself last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
