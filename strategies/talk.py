"""A federation as questions and answers, without a word on how messages travel.

`strategies.clear` and `strategies.blind` ask; `strategies.flower` and `simulations.loop` bring the answers. What must be
done alike of both stands here: how many answers are enough, and what is said of those that were refused.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Generator, Iterable, Iterator, Mapping, NamedTuple, Sequence

from fl.config import Config
from fl.journal import Journal
from fl.wire.flat import Packed
from strategies.gate import Refused

Facts = dict[str, Any]


class RunFailed(RuntimeError):
    """A run that cannot go on; the message names the client and its reason."""


class QuorumLost(RunFailed):
    """A round in which too few answers could be taken, as often as it was tried."""


class Question(NamedTuple):
    """``kind`` is train, evaluate, report or end; of each client's messages the next is sent while it answers that it is behind.

    ``most`` is how many bytes an answer has, at most; ``need`` how many answers there must be, for which it is worth while to
    wait for clients that are away.
    """

    kind: str
    round: int
    messages: Mapping[int, Iterator[tuple[Packed, Facts]]]
    most: int = 2**40
    need: int = 0


class Answer(NamedTuple):
    """What a client answered, or why that is not taken; ``packed`` is None where there is nothing but facts."""

    client: int
    facts: Facts
    packed: Packed | None = None
    refused: Refused | None = None


Talk = Generator[Question, Iterable[Answer], dict[str, Any]]


def drive(talk: Talk, answers: Callable[[Question], Iterable[Answer]]) -> dict[str, Any]:
    """Bring the ``answers`` to all the questions of ``talk``, and return what it returns."""
    try:
        question = next(talk)
        while True:
            question = talk.send(answers(question))
    except StopIteration as end:
        return end.value


def enough(config: Config, asked: int, least: int = 1) -> int:
    """Of ``asked`` clients how many must be admitted."""
    return max(least, math.ceil(config.quorum * asked - 1e-9))


def say(journal: Journal, round: int, refused: Sequence[Refused]) -> None:
    """A line on the screen for each answer that was not taken."""
    for one in refused:
        journal.say(f"round {round}: left out ({one.code}): {one}")


def lines(refused: Sequence[Refused]) -> list[dict[str, Any]]:
    """What a round's row keeps of the answers that were not taken."""
    return [{"client": one.client, "code": one.code, "reason": one.reason} for one in refused]


def again(journal: Journal, round: int, attempt: int, got: int, need: int, asked: int, refused: Sequence[Refused], what: str = "updates") -> None:
    """Say that a round was below the quorum and is tried again; raise QuorumLost when it has been tried often enough."""
    short = f"round {round} needs {what} of {need} of {asked} clients, got {got}"
    if attempt >= journal.config.retries:
        reasons = "; ".join(f"{one} ({one.code})" for one in refused[:3])
        raise QuorumLost(f"quorum lost: {short}; {reasons}" + (f"; resume with resume={journal.run}" if journal.rounds else ""))
    journal.say(f"{short}; the model stays as it is, and the round is tried again")
