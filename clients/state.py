"""What a node keeps from one round to the next: named tensors in a folder of its own, for one run and one client.

    <state>/<run>/client-003/<what>-00007.safetensors        as it stood after round 7

A process may end after any message, so nothing that outlives a round lives in one. The round is in the name: who asks for
what stood before round 8 gets that, also when round 8 was begun, written and broken off. Tensors are in plain order: the
patch embedding in cipher order, beside the public one, shows the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fl import durable
from fl.adapter import Adapter


class StateError(RuntimeError):
    """State that cannot be kept or read back; one line that says what to do."""


@dataclass(frozen=True)
class Drawer:
    """One client's state in one run, under the folder ``state``; nothing is touched until something is kept."""

    state: str
    run: str
    client: int

    @property
    def folder(self) -> Path:
        """Where the files lie. Raises StateError when ``run``, which the server chose, is no name for a folder."""
        if not re.fullmatch(r"[a-z0-9_-]{1,128}", self.run):
            raise StateError(f"what is kept between rounds needs a run's name of a-z, 0-9, _ and -, got {self.run[:60]!r}")
        return Path(self.state).expanduser() / self.run / f"client-{self.client:03}"

    def keep(self, what: str, round: int, tensors: Adapter) -> None:
        """Write ``what`` as it stands after ``round``, whole or not at all.

        Those of earlier rounds stay until `tidy`, for a round that is to be repeated; of later ones, which an attempt that was
        broken off left behind, none do.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # gradients of pictures are nobody else's business
        # cloned, since two names may stand for one tensor, which the format refuses
        durable.write(self._path(what, round), save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}))
        self.rewind(round, what)

    def tidy(self, safe: int) -> None:
        """Clear away what no round can ask for that comes after ``safe``: of each kind all before the newest of a round up to it."""
        kinds: dict[str, list[int]] = {}
        for what, round in self.listing():
            kinds.setdefault(what, []).append(round)
        for what, rounds in kinds.items():
            for old in sorted(r for r in rounds if r <= safe)[:-1]:
                self.forget(what, old)

    def listing(self) -> list[tuple[str, int]]:
        """All that is kept: what, and after which round."""
        found = (re.fullmatch(r"(.+)-(\d{5,})\.safetensors", p.name) for p in self.folder.glob("*.safetensors"))
        return [(match[1], int(match[2])) for match in found if match]

    def rewind(self, round: int, *whats: str) -> None:
        """Let all that was kept of ``whats`` after ``round`` be as if it had not been."""
        for what in whats:
            for later in (r for r in self._rounds(what) if r > round):
                self.forget(what, later)

    def forget(self, what: str, round: int) -> None:
        """Let ``what`` of ``round`` be as if it had not been kept; what stood before it stands again."""
        self._path(what, round).unlink(missing_ok=True)

    def recall(self, what: str, upto: int) -> tuple[int, Adapter] | None:
        """The newest ``what`` that stood after a round of at most ``upto``, and that round; None where there is none.

        Raises StateError for a file that cannot be read.
        """
        rounds = [r for r in self._rounds(what) if r <= upto]
        if not rounds:
            return None
        path = self._path(what, rounds[-1])
        try:
            return rounds[-1], load(path.read_bytes())
        except (SafetensorError, OSError) as error:
            reason = f"state file {path} must be as it was written, but cannot be read ({error})"
            raise StateError(f"{reason}; start the run anew") from None

    def _path(self, what: str, round: int) -> Path:
        return self.folder / f"{what}-{round:05}.safetensors"

    def _rounds(self, what: str) -> list[int]:
        found = (re.fullmatch(rf"{what}-(\d+)\.safetensors", p.name) for p in self.folder.glob(f"{what}-*.safetensors"))
        return sorted(int(match[1]) for match in found if match)
