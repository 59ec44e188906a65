"""The one adapter from strategies to Flower: roll call, questions out, answers back, over any Grid.

Flower's own ``Strategy.start`` samples random node ids, adds replies in the order of their arrival, and calls a run
completed in which every client failed. Here clients are known by their partition, answers come sorted, each is judged alone,
and a run that loses its quorum ends with the clients' own words.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fl.adapter import Adapter, digest
from fl.config import Config
from fl.journal import Journal
from fl.provenance import code_digest
from fl.wire.backoff import sooner
from fl.wire.coding import WHOLE
from fl.wire.flat import Packed, WireError, unpack
from fl.wire.ledger import Entry, entry
from fl.wire.records import TooLarge, carries, facts_of, packed_of, serialised_bytes, to_content
from strategies import blind, clear
from strategies.epochs import behind, furthest
from strategies.exchange import POLL, exchange
from strategies.gate import Refused, legible, readable
from strategies.rollcall import Roll, RollCallError, agree, remarks, roll_in
from strategies.talk import Answer, Question, RunFailed, drive

Nodes = dict[int, int]
"""Client -> node id."""


def federate(grid: Grid, config: Config, journal: Journal) -> dict[str, Any]:
    """Run the federation that ``config`` describes over ``grid`` and return its summary.

    Raises RunFailed (of which QuorumLost is one), RollCallError, IntegrityError and ConfigError.
    """
    sooner(sys.modules[type(grid).__module__])
    ledger: list[Entry] = []
    nodes, rolls = roll_call(grid, config, journal, ledger)
    start = starting_adapter(grid, config, nodes[0], rolls[0], ledger)
    talk = (blind if config.blind else clear).federate(config, journal, rolls, start, ledger)
    try:
        return drive(talk, lambda question: answers(grid, config, journal, question, nodes, ledger))
    finally:
        journal.close()


def answers(
    grid: Grid, config: Config, journal: Journal, question: Question, nodes: Nodes, ledger: list[Entry]
) -> Iterator[Answer]:
    """Tell every client its first message and give out an answer of each, or why there is none, in the order of the clients.

    Who answers that he is behind is told the next one. Who is not there is not waited for. All that travels is entered in
    ``ledger``.
    """
    number = {node: client for client, node in nodes.items()}
    kind, there = question.kind, present(grid, config, journal, question, nodes)

    def tell(client: int) -> Message:
        packed, facts = next(question.messages[client])
        told = message(kind, nodes[client], question.round, facts, packed)
        ledger.append(weigh(kind, "down", told, packed))
        return told

    for client in question.messages:
        if nodes[client] not in there:
            yield Answer(client, {}, None, Refused(client, "lost", "its node is away; start it again"))
    doing = {"train": "training", "evaluate": "evaluating", "report": "reporting", "end": "ending"}[kind]
    told = [tell(client) for client in question.messages if nodes[client] in there]
    for reply in exchange(grid, config.timeout, told, number, journal, f"round {question.round}/{config.rounds} {doing}"):
        while isinstance(reply, Message) and facts_of(reply).get("behind"):
            ledger.append(weigh(kind, "up", reply))
            client = number[reply.metadata.src_node_id]
            try:
                again = tell(client)
            except StopIteration:
                reply = Refused(client, "schema", "it says that it is behind, but has been sent the whole; look at its log")
            else:
                (reply,) = exchange(grid, config.timeout, [again], number)
        if isinstance(reply, Refused):
            yield Answer(reply.client, {}, None, reply)
            continue
        answer = answer_of(number[reply.metadata.src_node_id], reply, question.most)
        ledger.append(weigh(kind, "up", reply, answer.packed))
        yield answer


def present(grid: Grid, config: Config, journal: Journal, question: Question, nodes: Nodes) -> set[int]:
    """The nodes that are there; as long as they are too few for the question, and at most ``config.timeout``, it waits for more."""
    deadline, asked = time.monotonic() + config.timeout, {nodes[client] for client in question.messages}
    while len(asked & (there := set(grid.get_node_ids()))) < min(question.need, len(asked)) and time.monotonic() < deadline:
        left = f"{deadline - time.monotonic():.0f} s left"
        journal.waiting(f"round {question.round}: {len(asked & there)} of {len(asked)} nodes are there, {question.need} are needed, {left}")
        time.sleep(POLL)
    return there


def answer_of(client: int, reply: Message, most: int) -> Answer:
    """What a reply says, measured before it is decoded."""
    try:
        packed = readable(client, packed_of(reply, most), most) if carries(reply) else None
        return Answer(client, facts_of(reply), packed)
    except TooLarge as error:
        return Answer(client, {}, None, Refused(client, "size", str(error)))
    except WireError as error:
        return Answer(client, {}, None, Refused(client, "schema", str(error)))
    except Refused as reason:
        return Answer(client, {}, None, reason)


def roll_call(grid: Grid, config: Config, journal: Journal, ledger: list[Entry]) -> tuple[Nodes, list[Roll]]:
    """Wait for every node, ask each who it is, and return ``{client: node id}`` and the answers, both in client order.

    What it costs is added to ``ledger``. The first node to come says how many there are to be. Raises RollCallError when
    they do not come in time or differ, and RunFailed when one cannot work.
    """
    deadline = time.monotonic() + config.wait
    rolls: dict[int, Roll] = {}
    expected = 0
    while not expected or len(rolls) < expected:
        new = sorted(set(grid.get_node_ids()) - set(rolls))
        asked = [message("query", n, 0, {"run": journal.run}) for n in new]
        ledger += [weigh("query", "down", m) for m in asked]
        replies = [answered(reply) for reply in exchange(grid, config.wait, asked, {})]
        ledger += [weigh("query", "up", r) for r in replies]
        rolls |= {reply.metadata.src_node_id: roll_of(reply, config) for reply in replies}
        if rolls and not expected:
            expected = next(iter(rolls.values())).of
            _check_number(config, expected)
            hint = "; for another number: flwr run . --federation-config \"num-supernodes=N\", or simulations.launch --clients N"
            journal.say(f"{expected} clients" + (hint if "ray" in sys.modules else ""))
        if not replies:
            left = deadline - time.monotonic()
            if left < 0:
                raise RollCallError(
                    f"{expected or 'some'} clients must come within {config.wait:.0f} s, got {len(rolls)}; "
                    "start more nodes or raise wait"
                )
            journal.waiting(f"waiting for clients: {len(rolls)} of {expected or '?'}, {left:.0f} s left")
            time.sleep(POLL)
    for client in behind(list(rolls.values())):
        node = next(node for node, roll in rolls.items() if roll.client == client)
        asked = message("query", node, 0, {"run": journal.run, "epoch": furthest(list(rolls.values()))})
        (reply,) = map(answered, exchange(grid, config.wait, [asked], {node: client}))
        ledger += [weigh("query", "down", asked), weigh("query", "up", reply)]
        rolls[node] = roll_of(reply, config)._replace(kept=rolls[node].kept)  # which was told by the first answer alone
    pairs = sorted(rolls.items(), key=lambda pair: pair[1].client)
    agree([roll for _, roll in pairs], code_digest())
    for line in remarks([roll for _, roll in pairs]):
        journal.say(line)
    return {roll.client: node for node, roll in pairs}, [roll for _, roll in pairs]


def starting_adapter(grid: Grid, config: Config, node: int, roll: Roll, ledger: list[Entry]) -> Adapter:
    """The adapter that every client starts from, sent by one of them and checked against what all announced."""
    question = message("query", node, 0, {"start": True})
    (reply,) = map(answered, exchange(grid, config.timeout, [question], {node: roll.client}))
    ledger += [weigh("query", "down", question), weigh("query", "up", reply)]
    try:
        start = unpack(packed_of(reply), WHOLE)
    except WireError as error:
        raise RunFailed(f"client {roll.client}: {error}") from None
    if digest(start) != roll.digests["start"]:
        raise RunFailed(f"client {roll.client} sent another starting adapter than all clients announced")
    return start


def answered(reply: Message | Refused) -> Message:
    """The reply itself. Raises RunFailed when there is none: before round 1 nobody may be missing."""
    if isinstance(reply, Refused):
        raise RunFailed(str(reply))
    return reply


def _check_number(config: Config, brought: int) -> None:
    if config.clients and config.clients != brought:
        raise RollCallError(
            f"the config asks for {config.clients} clients, the engine brings {brought}; "
            f"add --federation-config \"num-supernodes={config.clients}\" (simulations.launch --clients {config.clients}), or set clients=0"
        )


def roll_of(reply: Message, config: Config) -> Roll:
    """The answer to the roll call in a reply. Raises RollCallError when there is none that can be believed."""
    node = reply.metadata.src_node_id
    try:
        roll = roll_in(facts_of(reply))
        if not config.blind and not (roll.train and roll.evaluate):
            raise ValueError("it must have images to train and to evaluate on")
    except ValueError as error:
        raise RollCallError(f"node {node} must answer the roll call ({legible(str(error), 200)}); does it run this version?") from None
    if (roll.train or 0) > config.gate.examples:
        raise RollCallError(f"client {roll.client} may have at most gate.examples={config.gate.examples} images, says {roll.train}; raise it if that is so")
    return roll


def message(kind: str, node: int, round: int, facts: dict[str, Any], packed: Packed | None = None) -> Message:
    """A message of ``kind`` to ``node``."""
    known = {"report": "query", "end": "query"}.get(kind, kind)  # the kinds that Flower knows
    return Message(to_content(facts, packed), dst_node_id=node, message_type=known, group_id=str(round))


def weigh(kind: str, way: str, sent: Message, packed: Packed | None = None) -> Entry:
    """The message's line in the ledger, from its serialised length, split by the groups of what is ``packed`` in it."""
    return entry(kind, way, packed.header if packed else "", serialised_bytes(sent))
