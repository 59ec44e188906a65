"""Blind aggregation as the server does it: it adds words that it cannot read, and sends the sums to those who can.

Each client opens the sum, takes the strategy's step itself (`clients.blind`) and trains from there; so nothing goes down
before round 2, and then one sum for each round that a client has not seen. One client of the round, the first, reports: it
opens the sum first and tells the server the mean training loss and, once all have been evaluated, the accuracy over all of
them: what the server ever learns of the model. A sum that does not open is dropped, and the round with it.

For who was away the server keeps the state that the reporting client locks, and the sums since: useless without the key,
complete with it. The whole federation stands here, without a word on how messages travel: `federate` asks, and whoever
drives it (`simulations.loop`, `strategies.flower`) brings the answers.
"""

from __future__ import annotations

import time
from itertools import chain
from typing import Any, Callable, Generator, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from fl.adapter import Adapter, count
from fl.config import Config, build
from fl.journal import Journal
from fl.wire import sealed
from fl.wire.flat import Packed, WireError, pack, unpack
from fl.wire.ledger import Entry, summarise
from fl.wire.octets import octets
from fl.wire.sealed import Sealed, Total
from strategies import ClientInfo, State, Strategy
from strategies.history import totals
from strategies.plan import cohort, enough, evaluates, may_be_blind, one_rank
from strategies.rollcall import Roll, summary

OCTETS = octets()
SCORE = 1           # values in a sealed evaluation
OFTEN = 10          # rounds after which a client locks the state anew, where all clients take part in all of them

Facts = dict[str, Any]


class Question(NamedTuple):
    """``kind`` is train, evaluate or report; of each client's messages the next is sent while it answers that it is behind."""

    kind: str
    round: int
    messages: Mapping[int, Iterator[tuple[Packed, Facts]]]


class Answer(NamedTuple):
    """What a client answered; ``packed`` is None where there is nothing but facts."""

    client: int
    facts: Facts
    packed: Packed | None


class Memory:
    """What a blind server has: the newest locked state, the sums of the rounds after it, and what each client has seen."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.state: tuple[int, Tensor] | None = None
        self.sums: dict[int, Total] = {}
        self._seen: dict[int, int] = {}

    def add(self, round: int, total: Total) -> None:
        """Keep the sum of ``round``."""
        self.sums[round] = total

    def drop(self, round: int, client: int) -> None:
        """Forget the sum of ``round``, which ``client`` was sent and did not take."""
        del self.sums[round]
        self._seen[client] = round - 1

    def lock(self, round: int, state: Tensor) -> None:
        """Keep the locked state after ``round``; one sum stays, since who is one round behind needs no more."""
        self.state, self.sums = (round, state), {r: t for r, t in self.sums.items() if r >= round}

    def messages(self, client: int, upto: int, facts: Mapping[str, Any]) -> Iterator[tuple[Packed, Facts]]:
        """What ``client`` lacks to stand after round ``upto``, and then, should it be behind even so, all that there is."""
        since = self._seen.get(client, 0)
        self._seen[client] = upto
        held = self.state is None or since >= self.state[0] - 1
        for tensors, start in (self.after(since) if held else self.all(), self.all()):
            yield pack(tensors, OCTETS), {"run": self.run, **facts, "since": start, "upto": upto}

    def after(self, since: int) -> tuple[Adapter, int]:
        """The sums of the rounds after ``since``, named for the wire, and ``since``."""
        return {n: t for r, s in self.sums.items() if r > since for n, t in sealed.named(f"{r:05}", s).items()}, since

    def all(self) -> tuple[Adapter, int]:
        """The locked state with the sums since, and its round."""
        if self.state is None:
            return self.after(0)
        round, state = self.state
        return {"sealed.state": state, **self.after(round)[0]}, round


def federate(
    config: Config, journal: Journal, rolls: Sequence[Roll], start: Adapter, ledger: list[Entry]
) -> Generator[Question, Iterable[Answer], dict[str, Any]]:
    """The federation that ``config`` describes, as questions to clients; returns the summary.

    ``start`` is the adapter that all start from. Whoever asks the questions enters all that travels in ``ledger``. Raises
    ConfigError before the first question.
    """
    strategy = build(config.strategy, recipe=config.recipe)
    infos = [ClientInfo(roll.client, 0, 0, roll.rank) for roll in rolls]
    may_be_blind(strategy, config, infos)
    one_rank(strategy, config, infos)
    enough(strategy, config, len(rolls))
    first = strategy.init(start)
    journal.begin()
    return _rounds(config, journal, rolls, strategy, first, ledger)


def _rounds(
    config: Config, journal: Journal, rolls: Sequence[Roll], strategy: Strategy, first: State, ledger: list[Entry]
) -> Generator[Question, Iterable[Answer], dict[str, Any]]:
    memory, before = Memory(journal.run), list(ledger)
    for round in range(1, config.rounds + 1):
        ledger.clear()
        began, members = time.monotonic(), cohort(config, round, len(rolls))
        recipe, given = strategy.ask(first, round, ClientInfo(members[0], 0, 0, rolls[members[0]].rank))
        size, scored = count(recipe.sent(given)), evaluates(config, round)
        away = config.fraction < 1 or round % OFTEN == 0
        ask = {"round": round}
        came = yield Question("train", round, {c: memory.messages(c, round - 1, ask) for c in members})
        total, refused = gather(came, size, config.seal.bits)
        row: dict[str, Any] = {"round": round, "cohort": members, "clients": [], "refused": refused}
        if total is None:
            row["skipped"] = "no message could be added"
        else:
            memory.add(round, total)
            reporter = members[0]
            wish = {**ask, "state": away}
            (told,) = yield Question("report", round, {reporter: memory.messages(reporter, round, wish)})
            if "refused" in told.facts:
                memory.drop(round, reporter)
                row["skipped"] = str(told.facts["refused"])
            else:
                row |= figures(told, "train_loss", "clipped") if "train_loss" in told.facts else {}  # of one client alone it is not
                if away and told.packed is not None:
                    memory.lock(round, state_of(told.packed))
        for line in [f"client {c}'s message is left out: {why}" for c, why in refused.items()] + [row.get("skipped", "")]:
            if line:
                journal.say(f"round {round}: {line}")
        if scored:
            last = round == config.rounds
            scores, unscored = gather((yield Question("evaluate", round, {c: memory.messages(c, round, ask) for c in range(len(rolls))})), SCORE, 32)
            for c, why in unscored.items():
                journal.say(f"round {round}: client {c}'s evaluation is left out: {why}")
            if scores is None:
                raise WireError(f"round {round}: no client's evaluation could be added; look at their logs")
            (told,) = yield Question("report", round, {0: scored_by(memory, round, scores, {**ask, "last": last})})
            if "refused" in told.facts:
                raise WireError(f"round {round}: the sum of the evaluations must open, but {told.facts['refused']}")
            row |= figures(told, "accuracy", "loss") | ({"unscored": unscored} if unscored else {})
        journal.round(row | {"seconds": time.monotonic() - began, "bytes": summarise(ledger)})

    return journal.finish(summary(rolls) | totals(journal.rounds, rolls[0].full_bytes, before), memory.all()[0], "sealed")


def drive(talk: Generator[Question, Iterable[Answer], dict[str, Any]], answers: Callable[[Question], Iterable[Answer]]) -> dict[str, Any]:
    """Bring the ``answers`` to all the questions of ``talk``, and return what it returns."""
    try:
        question = next(talk)
        while True:
            question = talk.send(answers(question))
    except StopIteration as end:
        return end.value


def gather(answers: Iterable[Answer], size: int, bits: sealed.Bits) -> tuple[Total | None, dict[int, str]]:
    """The sum of the sealed messages in ``answers``, and by client why one was left out; None when none is left.

    A message is left out that is of another size than ``size`` words, or the second of a client: the list of who is in the
    sum is all that opening it needs.
    """
    refused: dict[int, str] = {}
    seen: set[int] = set()

    def fitting() -> Iterator[Sealed]:
        for client, facts, packed in answers:
            try:
                if client in seen:
                    raise WireError("it has sent one already")
                came = unpack(packed, OCTETS) if packed else {}
                nonce, payload = (came.get(f"sealed.{part}", torch.zeros(0, dtype=torch.uint8)).numpy() for part in ("nonce", "payload"))
                if nonce.shape != (sealed.NONCE,) or payload.shape != (sealed.size(size, bits),):
                    raise WireError(f"it must have a nonce of {sealed.NONCE} bytes and {sealed.size(size, bits)} bytes more")
            except WireError as error:
                refused[client] = str(error)
                continue
            seen.add(client)
            yield Sealed(client, nonce.tobytes(), np.ascontiguousarray(payload))

    messages = fitting()
    head = next(messages, None)
    return (None, refused) if head is None else (sealed.add(chain([head], messages), size, bits), refused)


def scored_by(memory: Memory, round: int, scores: Total, facts: Facts) -> Iterator[tuple[Packed, Facts]]:
    """What the reporting client needs to open the ``scores``: it stands after ``round`` already, having been evaluated."""
    for packed, told in memory.messages(0, round, facts):
        yield pack({**unpack(packed, OCTETS), **sealed.named("scores", scores)}, OCTETS), told


def figures(told: Answer, *names: str) -> dict[str, float]:
    """The numbers of these ``names`` in a report. Raises WireError, naming the client, when it lacks one."""
    try:
        return {name: float(told.facts[name]) for name in names}
    except (KeyError, TypeError, ValueError):
        raise WireError(f"client {told.client}: a report must hold {' and '.join(names)}, got {sorted(told.facts)}") from None


def state_of(packed: Packed) -> Tensor:
    """The locked state in a report. Raises WireError when there is none."""
    try:
        return unpack(packed, OCTETS)["sealed.state"]
    except KeyError:
        raise WireError("a report must bring the locked state it was asked for, got none") from None
