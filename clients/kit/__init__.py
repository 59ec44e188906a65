"""What a machine needs to join: keys and certificates, the files of a deployment, and a doctor that looks before the start."""

from __future__ import annotations

from typing import NamedTuple


class KitError(ValueError):
    """A deployment that cannot be made or read: one line that says what must hold, what was got and what to do."""


class Finding(NamedTuple):
    """``name`` was looked at; is it ``ok``, what it ``says``, and what to ``do`` where it is not."""

    name: str
    ok: bool
    says: str
    do: str = ""
