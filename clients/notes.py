"""Notes: a small file in a client's drawer, of what it must not forget of a run whatever round the server names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Mapping, Sequence

from clients.state import Drawer, StateError
from fl import durable

FILE, STOPPED = "notes.json", "stopped"


@dataclass(frozen=True)
class Notes:
    """The notes in ``drawer``: words and numbers by name. They are on the disk before the client answers."""

    drawer: Drawer

    @property
    def stopped(self) -> str:
        """Why this client takes no further part in the run; empty while it does."""
        return str(self._read().get(STOPPED, ""))

    def stop(self, reason: str) -> None:
        """Take no further part in the run; the first ``reason`` stands."""
        self.first(STOPPED, reason)

    def first(self, name: str, value: str) -> str:
        """The value that was noted first under ``name``: ``value`` now, if nothing was."""
        notes = self._read()
        if name not in notes:
            self._write(notes | {name: value})
        return str(notes.get(name, value))

    def count(self, name: str) -> int:
        """How often this has been asked for ``name``, with this time."""
        notes = self._read()
        times = int(notes.get(name, 0)) + 1
        self._write(notes | {name: times})
        return times

    def listed(self, name: str) -> list[str]:
        """The words that `put` has put under ``name``; none before."""
        return str(self._read().get(name, "")).split()

    def put(self, words: Mapping[str, Sequence[str]]) -> None:
        """Put lists of words in the place of those of the same names."""
        self._write(self._read() | {name: " ".join(one) for name, one in words.items()})

    def _read(self) -> dict[str, str | int]:
        path = self.drawer.folder / FILE
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise StateError(f"notes {path} must be as they were written, but cannot be read ({error}); start the run anew") from None

    def _write(self, notes: dict[str, str | int]) -> None:
        self.drawer.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write(self.drawer.folder / FILE, json.dumps(notes) + "\n")
