"""Blind aggregation as the server does it: it adds words that it cannot read, and sends the sums to those who can.

Each client opens the sum, takes the strategy's step itself (`clients.blind`) and trains from there; so nothing goes down
before round 2, and then one sum for each round that a client has not seen. One client of the round reports: it opens the sum
first and, if it is its turn, tells the server the mean training loss and, once all have been evaluated, the accuracy over
all of them, rounded and of enough clients: all that it learns. A sum that does not open is dropped; the round is tried again.

For who was away the server keeps the state that the reporting client locks, and the sums since: useless without the key,
complete with it. The whole federation stands here, without a word on how messages travel: `federate` asks, and whoever
drives it (`simulations.loop`, `strategies.flower`) brings the answers. Its checkpoints are what it has: sealed, too.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import chain
from typing import Any, Generator, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch

from fl.adapter import Adapter, count
from fl.config import Config, build
from fl.journal import Journal
from fl.wire import sealed, transcript
from fl.wire.flat import Packed, WireError, pack, unpack
from fl.wire.ledger import Entry, summarise
from fl.wire.sealed import Sealed, Total
from strategies import ClientInfo, State, Strategy, epochs
from strategies.checkpoint import Checkpoints
from strategies.gate import SLACK, Refused
from strategies.history import totals
from strategies.memory import OCTETS, Memory
from strategies.plan import cohort, evaluates, fewest, may_be_blind, one_rank, teller
from strategies.plan import enough as enough_for
from strategies.report import figures, ordered, report, state_of, trusted
from strategies.rollcall import Roll, federation, same, seal_key, summary
from strategies.talk import Answer, Facts, Question, Talk, again, enough, lines, say
from strategies.witness import Witnesses, signers

SCORE = 1           # values in a sealed evaluation
TRAINED, EVALUATED = ("train_loss",), ("accuracy", "loss")  # what a report may tell
OFTEN = 10          # rounds after which a client locks the state anew, where all clients take part in all of them


def federate(config: Config, journal: Journal, rolls: Sequence[Roll], start: Adapter, ledger: list[Entry]) -> Talk:
    """The federation that ``config`` describes, as questions to clients; returns the summary.

    ``start`` is the adapter that all start from. Whoever asks the questions enters all that travels in ``ledger``. Raises
    ConfigError before the first question, IntegrityError for checkpoints that are all damaged, and QuorumLost.
    """
    strategy = build(config.strategy, recipe=config.recipe)
    infos = [ClientInfo(roll.client, 0, 0, roll.rank) for roll in rolls]
    may_be_blind(strategy, config, infos)
    one_rank(strategy, config, infos)
    enough_for(strategy, config, len(rolls))
    first = strategy.init(start)
    key = seal_key(rolls)
    before = transcript.begin(journal.run, config, key)
    journal.begin(len(rolls), signers=signers(rolls), key=key, transcript=before.hex())
    memory = Memory(journal.run, config.digest(), before)
    return _rounds(Run(config, journal, rolls, strategy, first, memory, Witnesses(journal, rolls)), ledger)


class Run(NamedTuple):
    """The parts of one run that stay from round to round."""

    config: Config
    journal: Journal
    rolls: Sequence[Roll]
    strategy: Strategy
    first: State
    memory: Memory
    witnesses: Witnesses


Heard = Generator[Question, Iterable[Answer], tuple[dict[str, Any], list[Refused]]]
"""A round's part of a talk; it returns what the round's row gains, and what was refused."""


def _rounds(run: Run, ledger: list[Entry]) -> Talk:
    config, journal, memory, before = run.config, run.journal, run.memory, [summarise(ledger)]
    checkpoints = Checkpoints(journal.folder / "checkpoints", config, journal.say)
    done, kept = checkpoints.newest() if config.resume else (0, None)
    if done:
        same(kept["federation"], run.rolls)
        before = kept["before"] + before
        memory.recall(kept["memory"])
    journal.rewind(done)
    for round in range(done + 1, config.rounds + 1):
        ledger.clear()
        began, memory.safe = time.monotonic(), checkpoints.safe(round)
        row, refused = yield from _train(run, round)
        if evaluates(config, round):
            scored, unscored = yield from _evaluate(run, round)
            row, refused = row | scored, refused + unscored
        row = {"round": round, "clients": []} | row | ({"refused": lines(refused)} if refused else {})
        taken = memory.taken(round)
        signed = run.witnesses.given(client for client, _ in taken["members"])
        journal.round(row | {"seconds": time.monotonic() - began, "bytes": summarise(ledger)}, sum=taken, **signed)
        checkpoints.commit(round, {"memory": memory.kept(), "before": before, "federation": federation(run.rolls)}, row.get("accuracy"))
    checkpoints.end()
    told = journal.finish(summary(run.rolls) | totals(journal.rounds, run.rolls[0].full_bytes, before), memory.all()[0], "sealed")
    mark = {"run": journal.run, "config": config.digest(), "round": config.rounds}
    yield from run.witnesses.close(mark, memory.transcript.hex())
    done = journal.conclude(told)
    yield from epochs.end(journal, run.rolls)  # the last of all: what is not written by now could not be resumed
    return done


def _train(run: Run, round: int) -> Heard:
    """Add the round's sum to the memory, one that opens and holds a quorum's messages at least."""
    config, memory, refused = run.config, run.memory, []
    members = cohort(config, round, len(run.rolls))
    recipe, given = run.strategy.ask(run.first, round, ClientInfo(members[0], 0, 0, run.rolls[members[0]].rank))
    size, need = count(recipe.sent(given)), enough(config, len(members), fewest(run.strategy, config, len(members)))
    away, accused = config.fraction < 1 or round % OFTEN == 0, Counter[int]()
    for attempt in range(config.retries + 1):
        asked = trusted(members, accused, need)
        messages = {c: memory.messages(c, round - 1, {"round": round, **run.witnesses.shown(c)}) for c in asked}
        came = yield Question("train", round, messages, sealed.size(size, 32) + SLACK, need)
        total, out = gather(run.witnesses.checked(came, memory.transcript.hex()), size, config.seal.bits)
        got = len(total.members) if total else 0
        if got >= need:
            memory.add(round, total)
            inside = ordered(total, teller(config, round, members))
            wish = {"round": round, "state": away}
            told = yield from report(round, inside, lambda c: memory.messages(c, round, wish), out, TRAINED, away, accused)
            if told:
                refused += out
                say(run.journal, round, out)
                if away:
                    memory.lock(round, state_of(told))
                return {"cohort": members} | figures(told, *TRAINED), refused
            memory.drop(round)
            got = 0
        refused += out
        say(run.journal, round, out)
        again(run.journal, round, attempt, got, need, len(members), out)
    raise AssertionError("the last attempt returns or raises")


def _evaluate(run: Run, round: int) -> Heard:
    """The accuracy and loss over a quorum of all clients at least."""
    config, memory, refused = run.config, run.memory, []
    ask, need = {"round": round}, enough(config, len(run.rolls), config.seal.members)
    for attempt in range(config.retries + 1):
        messages = {c: memory.messages(c, round, ask) for c in range(len(run.rolls))}
        scores, out = gather((yield Question("evaluate", round, messages, sealed.size(SCORE, 32) + SLACK, need)), SCORE, 32)
        got = len(scores.members) if scores else 0
        if got >= need:
            wish, inside = {**ask, "last": round == config.rounds}, ordered(scores, teller(config, round, range(len(run.rolls))))
            told = yield from report(round, inside, lambda c: scored_by(memory, c, round, scores, wish), out, EVALUATED)
            if told:
                refused += out
                say(run.journal, round, out)
                if told.facts.get("kept") is False:
                    run.journal.say(f"client {told.client} could not write the final adapter; its log says why")
                return figures(told, *EVALUATED), refused
            got = 0
        refused += out
        say(run.journal, round, out)
        again(run.journal, round, attempt, got, need, len(run.rolls), out, "evaluations")
    raise AssertionError("the last attempt returns or raises")


def gather(answers: Iterable[Answer], size: int, bits: sealed.Bits) -> tuple[Total | None, list[Refused]]:
    """The sum of the sealed messages in ``answers``, and the refusals of those that were left out; None when none is left.

    A message is left out that is of another size than ``size`` words, or the second of a client: the list of who is in the
    sum is all that opening it needs.
    """
    refused: list[Refused] = []
    seen: set[int] = set()

    def fitting() -> Iterator[Sealed]:
        for client, facts, packed, reason in answers:
            try:
                if reason:
                    raise reason
                if client in seen:
                    raise WireError("it has sent one already")
                came = unpack(packed, OCTETS) if packed else {}
                parts = (came.get(f"sealed.{part}", torch.zeros(0, dtype=torch.uint8)).numpy() for part in ("nonce", "echo", "payload"))
                nonce, echo, payload = parts
                if (nonce.shape, echo.shape) != ((sealed.NONCE,), (sealed.ECHO,)) or payload.shape != (sealed.size(size, bits),):
                    says = f"a nonce of {sealed.NONCE} bytes, an echo of {sealed.ECHO} and {sealed.size(size, bits)} bytes more"
                    raise WireError(f"it must have {says}")
            except Refused as error:
                refused.append(error)
                continue
            except WireError as error:
                refused.append(Refused(client, "seal", str(error)))
                continue
            seen.add(client)
            yield Sealed(client, nonce.tobytes(), np.ascontiguousarray(payload), echo.tobytes())

    messages = fitting()
    head = next(messages, None)
    return (None, refused) if head is None else (sealed.add(chain([head], messages), size, bits), refused)


def scored_by(memory: Memory, client: int, round: int, scores: Total, facts: Facts) -> Iterator[tuple[Packed, Facts]]:
    """The messages by which the reporting client opens the ``scores``: it stands after ``round`` already, having been evaluated."""
    for packed, told in memory.messages(client, round, facts):
        yield pack({**unpack(packed, OCTETS), **sealed.named("scores", scores)}, OCTETS), told
