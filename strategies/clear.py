"""The federation of a server that sees each update: gate, quorum, aggregate, evaluate, commit.

    ask the cohort  →  judge each answer alone  →  enough? apply : try again  →  evaluate  →  write the round, then the checkpoint

What resumes from a checkpoint equals what never stopped: the state, what each client has been sent, and up to which round its
updates have counted are all that outlives a round. A client is told the last; what a later round left in its state folder is
then as if it had not been.
"""

from __future__ import annotations

import time
from itertools import chain, islice
from typing import Any, Generator, Iterable, Iterator, Mapping, NamedTuple, Sequence

from fl.adapter import Adapter
from fl.config import Config, build
from fl.journal import Journal
from fl.recipe import Recipe
from fl.wire.coding import Coding, coding
from fl.wire.ledger import Entry, summarise
from strategies import ClientInfo, State, Strategy, Update
from strategies.catchup import Catchup
from strategies.checkpoint import Checkpoints
from strategies.downlink import Downlink
from strategies.gate import HIGHEST, SLACK, Refused, admit, fresh, most, number, steps_of, update_of
from strategies.history import Evaluation, Watch, history_row, totals
from strategies.lengths import Lengths, reach
from strategies.plan import cohort, evaluates, one_rank, orders, scores_own
from strategies.plan import enough as enough_for
from strategies.rollcall import Roll, federation, same, summary
from strategies.talk import Answer, Question, Talk, again, enough, lines, say
from strategies.witness import Witnesses, signers


class Run(NamedTuple):
    """The parts of one run that stay from round to round; ``counted`` says of each client which of its rounds was the last to count."""

    config: Config
    journal: Journal
    strategy: Strategy
    rolls: Sequence[Roll]
    infos: Mapping[int, ClientInfo]
    wire: Coding
    downlink: Downlink
    checkpoints: Checkpoints
    counted: dict[int, int]
    lengths: Lengths
    witnesses: Witnesses

    def mark(self, round: int) -> dict[str, Any]:
        """What tells a message of this run and round from all others; an answer says it, too."""
        return {"run": self.journal.run, "config": self.config.digest(), "round": round}

    def hopeless(self, attempt: int, asked: int, need: int) -> int:
        """How many refusals the round can bear: in a last attempt nobody is waited for in vain."""
        return asked - need if attempt == self.config.retries else asked


def federate(config: Config, journal: Journal, rolls: Sequence[Roll], start: Adapter, ledger: list[Entry]) -> Talk:
    """The federation that ``config`` describes, as questions to clients; returns the summary.

    ``start`` is the adapter that all start from. Whoever asks the questions enters all that travels in ``ledger``. Raises
    ConfigError before the first question, IntegrityError for checkpoints that are all damaged, and QuorumLost.
    """
    strategy, wire = build(config.strategy, recipe=config.recipe), coding(config)
    infos = {roll.client: ClientInfo(roll.client, roll.train or 0, roll.evaluate or 0, roll.rank) for roll in rolls}
    enough_for(strategy, config, len(rolls))
    one_rank(strategy, config, infos.values())
    state, catchup = strategy.init(start), Catchup(strategy)
    downlink = Downlink(wire, catchup, config.seed, start)
    journal.begin(len(rolls), signers=signers(rolls))
    checkpoints = Checkpoints(journal.folder / "checkpoints", config, journal.say)
    run = Run(config, journal, strategy, rolls, infos, wire, downlink, checkpoints, {}, Lengths(config.gate.norm), Witnesses(journal, rolls))
    return _rounds(run, state, catchup, ledger)


def _rounds(run: Run, state: State, catchup: Catchup, ledger: list[Entry]) -> Talk:
    config, journal, checkpoints, before = run.config, run.journal, run.checkpoints, [summarise(ledger)]
    done, kept = checkpoints.newest() if config.resume else (0, None)
    if done:
        same(kept["federation"], run.rolls)
        state, before = kept["state"], kept["before"] + before
        run.counted.update(kept["counted"])
        run.lengths.recall(kept["lengths"])
        catchup.recall(kept["catchup"])
        run.downlink.recall(kept["downlink"])
    journal.rewind(done)
    for round in range(done + 1, config.rounds + 1):
        ledger.clear()
        began = time.monotonic()
        state, watch, refused = yield from _train(run, state, round)
        scores: list[Evaluation] = []
        if evaluates(config, round):
            scores, unscored = yield from _evaluate(run, state, round)
            refused += unscored
        row = history_row(round, watch, sorted(scores), ledger, time.monotonic() - began)
        journal.round(row | ({"refused": lines(refused)} if refused else {}), **run.witnesses.given(row["cohort"]))
        memory = {"catchup": catchup.kept(), "downlink": run.downlink.kept(), "counted": run.counted, "before": before}
        memory["lengths"] = run.lengths.kept()
        memory["federation"] = federation(run.rolls)
        checkpoints.commit(round, {"state": state, **memory}, row.get("accuracy"))
    checkpoints.end()
    whole = catchup.whole(state, run.strategy.view(state))
    told = journal.finish(summary(run.rolls) | totals(journal.rounds, run.rolls[0].full_bytes, before), whole)
    yield from run.witnesses.close(run.mark(config.rounds))
    return journal.conclude(told)


def _train(run: Run, state: State, round: int) -> Generator[Question, Iterable[Answer], tuple[State, Watch, list[Refused]]]:
    """The state after ``round``, from updates of a quorum at least; what is known of them, and what was refused."""
    config, refused = run.config, []
    members = cohort(config, round, len(run.rolls))
    need, sent = enough(config, len(members), run.strategy.fewest), run.downlink.kept()
    for attempt in range(config.retries + 1):
        run.downlink.recall(sent)  # who is asked again is sent the same again
        run.lengths.begin()
        watch, asked, messages, out = Watch(few=len(members) <= config.diagnostics), {}, {}, []
        for client in members:
            asked[client] = recipe, given = orders(run.strategy, config, state, round, run.infos[client])
            facts = {"recipe": recipe.to_json(), "scored": scores_own(config, round), "counted": run.counted.get(client, 0)}
            facts |= {"safe": run.checkpoints.safe(round), **run.witnesses.shown(client)}
            messages[client] = run.downlink.messages(state, round - 1, client, given, run.mark(round) | facts)
        came = yield Question("train", round, messages, max(most(given) for _, given in asked.values()), need)
        updates = admitted(came, run, round, asked, watch, out, run.hopeless(attempt, len(members), need))
        after = applied(run.strategy, state, round, updates)
        refused += out
        say(run.journal, round, out)
        if after is not None and len(watch.rows) >= need:
            run.counted.update({row["client"]: round for row in watch.rows})
            run.lengths.commit()
            return after, watch, refused
        again(run.journal, round, attempt, len(watch.rows), need, len(members), out)
    raise AssertionError("the last attempt returns or raises")


def _evaluate(run: Run, state: State, round: int) -> Generator[Question, Iterable[Answer], tuple[list[Evaluation], list[Refused]]]:
    """The clients' evaluations of the global adapter after ``round``, a quorum's at least; and what was refused."""
    config, view, waiting = run.config, run.strategy.view(state), list(run.infos)
    scores, refused, need = [], [], enough(config, len(run.infos))
    for attempt in range(config.retries + 1):
        messages = {c: run.downlink.messages(state, round, c, view, run.mark(round)) for c in waiting}
        came, out = (yield Question("evaluate", round, messages, SLACK, need - len(scores))), []
        scores += evaluations(came, run, round, out, run.hopeless(attempt, len(run.infos), need))
        refused += out
        say(run.journal, round, out)
        if len(scores) >= need:
            return scores, refused
        again(run.journal, round, attempt, len(scores), need, len(run.infos), out, "evaluations")
        waiting = [c for c in waiting if c not in {score.client for score in scores}]
    raise AssertionError("the last attempt returns or raises")


def applied(strategy: Strategy, state: State, round: int, updates: Iterator[Update]) -> State | None:
    """The next state; None when there are fewer updates than ``strategy`` can make one of."""
    head = list(islice(updates, strategy.fewest))
    if len(head) < strategy.fewest:
        return None
    return strategy.apply(state, round, chain(head, updates))


def admitted(
    answers: Iterable[Answer], run: Run, round: int, asked: Mapping[int, tuple[Recipe, Adapter]], watch: Watch,
    refused: list[Refused], hopeless: int,
) -> Iterator[Update]:  # fmt: skip
    """The updates in ``answers`` that pass the gate, one at a time; the others go to ``refused``.

    ``asked`` holds for each client what it was asked and given; what is kept of an update goes to ``watch``. After more than
    ``hopeless`` refusals no more answers are waited for.
    """
    for answer in answers:
        try:
            if answer.refused:
                raise answer.refused
            recipe, given = asked[answer.client]
            fresh(answer.client, answer.facts, run.mark(round))
            sent, info = recipe.sent(given), run.infos[answer.client]
            update = update_of(answer.client, answer.facts, answer.packed, run.wire.differences, sent)
            whole = reach(recipe, given, steps_of(recipe, info))
            admit(update, sent, info, run.lengths.longest(whole), recipe)
            run.witnesses.heard(answer)
        except Refused as reason:
            refused.append(reason)
            if len(refused) > hopeless:
                return
            continue
        run.lengths.see(update.adapter, whole)
        yield watch.see(given, update)


def evaluations(answers: Iterable[Answer], run: Run, round: int, refused: list[Refused], hopeless: int) -> Iterator[Evaluation]:
    """The evaluations in ``answers`` whose sums are possible for their shards; the others go to ``refused``, as in `admitted`."""
    for answer in answers:
        try:
            if answer.refused:
                raise answer.refused
            fresh(answer.client, answer.facts, run.mark(round))
            found = evaluation_of(run.rolls[answer.client], answer.facts)
        except Refused as reason:
            refused.append(reason)
            if len(refused) > hopeless:
                return
            continue
        yield found


def evaluation_of(roll: Roll, facts: Mapping[str, Any]) -> Evaluation:
    """The evaluation in an answer. Raises Refused unless its sums are possible for the client's shard."""
    try:
        found = Evaluation(roll.client, *(number(facts, name) for name in ("loss", "correct", "examples")))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused(roll.client, "schema", f"an evaluation must hold loss, correct and examples ({error})") from None
    if not (0 <= found.loss <= HIGHEST * found.examples and 0 <= found.correct <= found.examples == roll.evaluate):
        says = f"an evaluation must be of its {roll.evaluate} images with a loss of 0 to {HIGHEST:g} an image, got {found}"
        raise Refused(roll.client, "metrics", says)
    return found
