"""The epochs of the clients' seal keys: all of one before round 1, and one further on when the run has ended.

The server sees an epoch's number and a fingerprint. It has no key, and asks only for steps that cannot be taken back.
"""

from __future__ import annotations

from typing import Generator, Iterable, Sequence

from fl.journal import Journal
from fl.wire.flat import pack
from fl.wire.octets import octets
from strategies.rollcall import Roll
from strategies.talk import Answer, Question


def furthest(rolls: Sequence[Roll]) -> int:
    """The epoch at which the clients' seal keys are to stand: the largest, at most one beyond what two of them have reached.

    Steps cannot be taken back, so one client alone leads the others no further than the end of one run does.
    """
    first, *others = sorted((roll.epoch for roll in rolls), reverse=True)
    return min(first, others[0] + 1) if others else first


def behind(rolls: Sequence[Roll]) -> list[int]:
    """The clients whose seal keys have not come so far: they were away when a run ended."""
    return [roll.client for roll in rolls if roll.epoch < furthest(rolls)]


def end(journal: Journal, rolls: Sequence[Roll]) -> Generator[Question, Iterable[Answer], None]:
    """Let every client's seal key step. Who does not answer will at the next run's roll call."""
    facts = {"run": journal.run, "epoch": furthest(rolls) + 1, "end": True}
    messages = {roll.client: iter([(pack({}, octets()), facts)]) for roll in rolls}
    for told in (yield Question("end", journal.config.rounds, messages)):
        if told.refused:
            says = f"its seal key has not stepped to epoch {facts['epoch']} ({told.refused.code})"
            journal.say(f"client {told.client}: {says}; it will when the next run begins")
