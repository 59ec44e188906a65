"""The one adapter from `Strategy` to Flower: roll call, seeded cohorts, quorum, federated evaluation, over any Grid.

Flower's own ``Strategy.start`` samples random node ids, adds replies in the order of their arrival, and calls a run
completed in which every client failed. Here clients are known by their partition, replies are sorted, and a run in which
a client fails ends with the client's own words.
"""

from __future__ import annotations

import math
import time
from typing import Any, Callable, Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fl.adapter import Adapter, digest
from fl.config import Config, build
from fl.journal import Journal
from fl.provenance import code_digest
from fl.recipe import Recipe
from fl.wire.coding import WHOLE, coding
from fl.wire.flat import Codecs, Packed, WireError, unpack
from fl.wire.ledger import Entry, entry
from fl.wire.records import facts_of, packed_of, serialised_bytes, to_content
from strategies import ClientInfo, Update, blind
from strategies.blind import Answer, Question, drive
from strategies.catchup import Catchup
from strategies.downlink import Downlink
from strategies.exchange import POLL, RunFailed, exchange
from strategies.gate import ALWAYS, OWN, admit
from strategies.history import Evaluation, Watch, history_row, totals
from strategies.plan import cohort, enough, evaluates, one_rank, orders, scores_own
from strategies.rollcall import Roll, RollCallError, agree, remarks, summary


def federate(grid: Grid, config: Config, journal: Journal) -> dict[str, Any]:
    """Run the federation that ``config`` describes over ``grid`` and return its summary.

    Raises RunFailed, RollCallError and ConfigError.
    """
    wire, before = coding(config), []
    nodes, rolls = roll_call(grid, config, journal, before)
    if config.blind:
        return blindly(grid, config, journal, nodes, rolls, before)
    strategy = build(config.strategy, recipe=config.recipe)
    infos = {roll.client: ClientInfo(roll.client, roll.train or 0, roll.evaluate or 0, roll.rank) for roll in rolls}
    enough(strategy, config, len(nodes))
    one_rank(strategy, config, infos.values())
    number = {node: client for client, node in nodes.items()}
    start = starting_adapter(grid, config, nodes[0], rolls[0], before)
    state, catchup = strategy.init(start), Catchup(strategy)
    downlink = Downlink(wire, catchup, config.seed, start)
    journal.begin()

    for round in range(1, config.rounds + 1):
        began, ledger, asked, orders_of = time.monotonic(), [], {}, {}
        members = cohort(config, round, len(nodes))
        watch = Watch(few=len(members) <= config.diagnostics)
        for client in members:
            asked[client] = recipe, given = orders(strategy, config, state, round, infos[client])
            facts = {"run": journal.run, "round": round, "recipe": recipe.to_json(), "scored": scores_own(config, round)}
            orders_of[client] = downlink.messages(state, round - 1, client, given, facts)
        replies = converse(grid, config, journal, "train", round, orders_of, nodes, ledger)
        state = strategy.apply(state, round, updates_of(replies, number, infos, asked, wire.differences, watch, ledger))

        scores: list[Evaluation] = []
        if evaluates(config, round):
            view = strategy.view(state)
            orders_of = {client: downlink.messages(state, round, client, view, {"run": journal.run}) for client in nodes}
            for reply in converse(grid, config, journal, "evaluate", round, orders_of, nodes, ledger):
                scores.append(evaluation_of(rolls[number[reply.metadata.src_node_id]], reply))
                ledger.append(weigh("evaluate", "up", reply))
        journal.round(history_row(round, watch, scores, ledger, time.monotonic() - began))

    return journal.finish(summary(rolls) | totals(journal.rounds, rolls[0].full_bytes, before), catchup.whole(state, strategy.view(state)))


def blindly(
    grid: Grid, config: Config, journal: Journal, nodes: Mapping[int, int], rolls: list[Roll], ledger: list[Entry]
) -> dict[str, Any]:
    """The run, with a server that can read nothing (`strategies.blind`): here is only how messages travel."""
    number = {node: client for client, node in nodes.items()}

    def answers(question: Question) -> Iterator[Answer]:
        for reply in converse(grid, config, journal, question.kind, question.round, question.messages, nodes, ledger):
            ledger.append(weigh(question.kind, "up", reply))
            packed = packed_of(reply) if reply.content.array_records else None
            yield Answer(number[reply.metadata.src_node_id], facts_of(reply), packed)

    start = starting_adapter(grid, config, nodes[0], rolls[0], ledger)
    return drive(blind.federate(config, journal, rolls, start, ledger), answers)


def converse(
    grid: Grid,
    config: Config,
    journal: Journal,
    kind: str,
    round: int,
    orders_of: Mapping[int, Iterator[tuple[Packed, dict[str, Any]]]],
    nodes: Mapping[int, int],
    ledger: list[Entry],
) -> Iterator[Message]:
    """Tell every client its first order and give out one reply of each, in the order of the clients.

    Who answers that he is behind with the base is told the next one. What is said and such answers go to ``ledger``; the
    replies given out do not. Raises RunFailed.
    """
    number = {node: client for client, node in nodes.items()}

    def tell(client: int) -> Message:
        packed, facts = next(orders_of[client], (None, None))
        if packed is None:
            raise RunFailed(f"client {client} must take what is sent whole, but is behind even so; look at its log")
        told = message(kind, nodes[client], round, facts, packed)
        ledger.append(weigh(kind, "down", told))
        return told

    doing = {"train": "training", "evaluate": "evaluating", "report": "reporting"}[kind]
    messages = [tell(client) for client in orders_of]
    for reply in exchange(grid, config.timeout, messages, number, journal, f"round {round}/{config.rounds} {doing}"):
        while facts_of(reply).get("behind"):
            ledger.append(weigh(kind, "up", reply))
            (reply,) = exchange(grid, config.timeout, [tell(number[reply.metadata.src_node_id])], number)
        yield reply


def updates_of(
    replies: Iterable[Message],
    number: Mapping[int, int],
    infos: Mapping[int, ClientInfo],
    asked: Mapping[int, tuple[Recipe, Adapter]],
    codec: Codecs,
    watch: Watch,
    ledger: list[Entry],
) -> Iterator[Update]:
    """The admitted updates in ``replies``, one at a time; what is kept of each goes to ``watch`` and ``ledger``.

    ``asked`` holds for each client what it was asked and given, ``infos`` what it said of itself. Raises RunFailed and
    Refused, which name the client.
    """
    for reply in replies:
        update = update_of(number[reply.metadata.src_node_id], reply, codec)
        recipe, given = asked[update.client]
        admit(update, recipe.sent(given), infos[update.client])
        ledger.append(weigh("train", "up", reply))
        yield watch.see(given, update)


def roll_call(grid: Grid, config: Config, journal: Journal, ledger: list[Entry]) -> tuple[dict[int, int], list[Roll]]:
    """Wait for every node, ask each who it is, and return ``{client: node id}`` and the answers, both in client order.

    What it costs is added to ``ledger``. The first node to come says how many there are to be. Raises RollCallError when
    they do not come in time or differ, and RunFailed when one cannot work.
    """
    deadline = time.monotonic() + config.wait
    answers: dict[int, Roll] = {}
    expected = 0
    while not expected or len(answers) < expected:
        new = sorted(set(grid.get_node_ids()) - set(answers))
        asked = [message("query", n, 0, {"run": journal.run}) for n in new]
        ledger += [weigh("query", "down", m) for m in asked]
        replies = list(exchange(grid, config.wait, asked, {}))
        ledger += [weigh("query", "up", r) for r in replies]
        answers |= {reply.metadata.src_node_id: roll_of(reply) for reply in replies}
        if answers and not expected:
            expected = next(iter(answers.values())).of
            _check_number(config, expected)
            journal.say(f"{expected} clients; for another number: flwr run . --federation-config \"num-supernodes=N\", or simulations.launch --clients N")
        if not replies:
            if time.monotonic() > deadline:
                raise RollCallError(
                    f"{expected or 'some'} clients must come within {config.wait:.0f} s, got {len(answers)}; "
                    "start more nodes or raise wait"
                )
            journal.progress(f"waiting for clients: {len(answers)} of {expected or '?'}, {deadline - time.monotonic():.0f} s left")
            time.sleep(POLL)
    pairs = sorted(answers.items(), key=lambda pair: pair[1].client)
    rolls = [roll for _, roll in pairs]
    agree(rolls, code_digest())
    for line in remarks(rolls):
        journal.say(line)
    return {roll.client: node for node, roll in pairs}, rolls


def starting_adapter(grid: Grid, config: Config, node: int, roll: Roll, ledger: list[Entry]) -> Adapter:
    """The adapter that every client starts from, sent by one of them and checked against what all announced."""
    question = message("query", node, 0, {"start": True})
    (reply,) = exchange(grid, config.timeout, [question], {node: roll.client})
    ledger += [weigh("query", "down", question), weigh("query", "up", reply)]
    try:
        start = unpack(packed_of(reply), WHOLE)
    except WireError as error:
        raise RunFailed(f"client {roll.client}: {error}") from None
    if digest(start) != roll.digests["start"]:
        raise RunFailed(f"client {roll.client} sent another starting adapter than all clients announced")
    return start


def _check_number(config: Config, brought: int) -> None:
    if config.clients and config.clients != brought:
        raise RollCallError(
            f"the config asks for {config.clients} clients, the engine brings {brought}; "
            f"add --federation-config \"num-supernodes={config.clients}\" (simulations.launch --clients {config.clients}), or set clients=0"
        )


def update_of(client: int, reply: Message, codec: Codecs) -> Update:
    """The update in a reply. Raises RunFailed, naming the client, when there is none that can be read."""
    try:
        facts = facts_of(reply)
        metrics = {name: float(facts["metrics"][name]) for name in (*ALWAYS, *(OWN if "own_loss" in facts["metrics"] else ()))}
        return Update(client, unpack(packed_of(reply), codec), int(facts["examples"]), metrics)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunFailed(f"client {client}: an update must hold an adapter, examples and metrics ({error})") from None


def roll_of(reply: Message) -> Roll:
    """The answer to the roll call in a reply. Raises RollCallError when there is none that can be read."""
    try:
        return Roll(**facts_of(reply))
    except (TypeError, ValueError) as error:
        raise RollCallError(f"node {reply.metadata.src_node_id} must answer the roll call ({error}); does it run this version?") from None


def evaluation_of(roll: Roll, reply: Message) -> Evaluation:
    """The evaluation in a reply. Raises RunFailed, naming the client, unless its sums are possible for its shard."""
    try:
        facts = facts_of(reply)
        found = Evaluation(roll.client, float(facts["loss"]), int(facts["correct"]), int(facts["examples"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunFailed(f"client {roll.client}: an evaluation must hold loss, correct and examples ({error})") from None
    if not (math.isfinite(found.loss) and 0 <= found.correct <= found.examples == roll.evaluate):
        raise RunFailed(f"client {roll.client}: an evaluation must be of its {roll.evaluate} images with a finite loss, got {found}")
    return found


def message(kind: str, node: int, round: int, facts: dict[str, Any], packed: Packed | None = None) -> Message:
    """A message of ``kind`` to ``node``."""
    known = {"report": "query"}.get(kind, kind)  # the kinds that Flower knows
    return Message(to_content(facts, packed), dst_node_id=node, message_type=known, group_id=str(round))


def weigh(kind: str, way: str, sent: Message) -> Entry:
    """The message's line in the ledger, from its serialised length."""
    header = str(sent.content["facts"].get("header", ""))
    return entry(kind, way, header, serialised_bytes(sent))
