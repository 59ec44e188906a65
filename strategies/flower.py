"""The one adapter from `Strategy` to Flower: roll call, seeded cohorts, quorum, federated evaluation, over any Grid.

Flower's own ``Strategy.start`` samples random node ids, adds replies in the order of their arrival, and calls a run
completed in which every client failed. Here clients are known by their partition, replies are sorted, and a run in which
a client fails ends with the client's own words.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fl.adapter import Adapter
from fl.config import Config, build
from fl.journal import Journal
from fl.provenance import code_digest
from fl.wire.flat import Codec, Packed, WireError, pack, unpack
from fl.wire.float32 import float32
from fl.wire.ledger import Entry, entry
from fl.wire.records import facts_of, packed_of, serialised_bytes, to_content
from strategies import ClientInfo, Update
from strategies.gate import admit
from strategies.history import Evaluation, history_row, totals
from strategies.plan import cohort, evaluates, orders
from strategies.rollcall import Roll, RollCallError, agree, summary

POLL = 0.05  # seconds between looks for replies


class RunFailed(RuntimeError):
    """A run that cannot go on; the message names the client and its reason."""


def federate(grid: Grid, config: Config, journal: Journal) -> dict[str, Any]:
    """Run the federation that ``config`` describes over ``grid`` and return its summary. Raises RunFailed and RollCallError."""
    codec = float32()
    nodes, rolls = roll_call(grid, config, journal)
    infos = {roll.client: ClientInfo(roll.client, roll.train) for roll in rolls}
    (asked,) = exchange(grid, config, [message("query", nodes[0], 0, {"start": True})], lambda node: 0)
    start = unpack(packed_of(asked), codec)

    strategy = build(config.strategy, recipe=config.recipe)
    state = strategy.init(start)
    number = {node: client for client, node in nodes.items()}
    envelope = 0

    for round in range(1, config.rounds + 1):
        began, ledger, given = time.monotonic(), [], {}
        messages = []
        for client in cohort(config, round, len(nodes)):
            recipe, given[client] = orders(strategy, config, state, round, infos[client])
            packed = pack(given[client], codec)
            messages.append(message("train", nodes[client], round, {"round": round, "recipe": recipe.to_json()}, packed))
            ledger.append(weigh("train", "down", messages[-1]))
        replies = exchange(grid, config, messages, number.__getitem__, journal, f"round {round}/{config.rounds} training")
        updates = []
        for reply in replies:
            update = update_of(number[reply.metadata.src_node_id], reply, codec)
            updates.append(admit(update, given[update.client]))
            ledger.append(weigh("train", "up", reply))
            envelope = ledger[-1].total - packed_of(reply).nbytes
        state = strategy.apply(state, round, updates)

        scores: list[Evaluation] = []
        if evaluates(config, round):
            packed = pack(strategy.view(state), codec)
            messages = [message("evaluate", node, round, {}, packed) for node in nodes.values()]
            ledger += [weigh("evaluate", "down", m) for m in messages]
            replies = exchange(grid, config, messages, number.__getitem__, journal, f"round {round}/{config.rounds} evaluating")
            scores = [Evaluation(client=number[r.metadata.src_node_id], **facts_of(r)) for r in replies]
            ledger += [weigh("evaluate", "up", r) for r in replies]
        journal.round(history_row(round, updates, scores, ledger, time.monotonic() - began))

    facts = summary(rolls) | totals(journal.rounds, rolls[0].full_bytes, envelope)
    return journal.finish(facts, strategy.view(state))


def roll_call(grid: Grid, config: Config, journal: Journal) -> tuple[dict[int, int], list[Roll]]:
    """Wait for every node, ask each who it is, and return ``{client: node id}`` and the answers, both in client order.

    The first node to come says how many there are to be. Raises RollCallError when they do not come in time, when one
    cannot work, or when they differ.
    """
    deadline = time.monotonic() + config.wait
    answers: dict[int, Message] = {}
    expected = 0
    while not expected or len(answers) < expected:
        new = sorted(set(grid.get_node_ids()) - set(answers))
        replies = exchange(grid, config, [message("query", n, 0, {"run": journal.run}) for n in new], lambda node: None)
        answers |= {reply.metadata.src_node_id: reply for reply in replies}
        if replies and not expected:
            expected = int(facts_of(replies[0])["of"])
            _check_number(config, expected)
            journal.say(f"{expected} clients; for another number: flwr run . --federation-config \"num-supernodes=N\"")
        if not replies:
            if time.monotonic() > deadline:
                raise RollCallError(f"{expected or 'some'} clients must come within {config.wait:.0f} s, got {len(answers)}; start more nodes or raise wait")
            journal.progress(f"waiting for clients: {len(answers)} of {expected or '?'}, {deadline - time.monotonic():.0f} s left")
            time.sleep(POLL)
    pairs = sorted((Roll(**facts_of(reply)), node) for node, reply in answers.items())
    rolls = [roll for roll, _ in pairs]
    agree(rolls, code_digest())
    for name, count in summary(rolls)["faults"].items():
        journal.say(f"data: {count} images {name}")
    return {roll.client: node for roll, node in pairs}, rolls


def _check_number(config: Config, brought: int) -> None:
    if config.clients and config.clients != brought:
        raise RollCallError(
            f"the config asks for {config.clients} clients, the engine brings {brought}; "
            f"add --federation-config \"num-supernodes={config.clients}\", or set clients=0"
        )


def update_of(client: int, reply: Message, codec: Codec) -> Update:
    """The update in a reply. Raises RunFailed, naming the client, when there is none that can be read."""
    try:
        facts = facts_of(reply)
        metrics = {name: float(facts["metrics"][name]) for name in ("loss", "steps", "seconds")}
        return Update(client, unpack(packed_of(reply), codec), int(facts["examples"]), metrics)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(f"client {client}: an update must hold an adapter, examples and metrics ({error})") from None


def message(kind: str, node: int, round: int, facts: dict[str, Any], packed: Packed | None = None) -> Message:
    """A message of ``kind`` to ``node``."""
    return Message(to_content(facts, packed), dst_node_id=node, message_type=kind, group_id=str(round))


def weigh(kind: str, way: str, sent: Message) -> Entry:
    """The message's line in the ledger, from its serialised length."""
    header = str(sent.content["facts"].get("header", ""))
    return entry(kind, way, header, serialised_bytes(sent))


def exchange(
    grid: Grid,
    config: Config,
    messages: Iterable[Message],
    client_of: Callable[[int], int | None],
    journal: Journal | None = None,
    doing: str = "",
) -> list[Message]:
    """Send, wait, and return one reply for each message, sorted by client. Raises RunFailed when one is missing or an error."""
    waiting = set(grid.push_messages(list(messages)))
    total, deadline, replies = len(waiting), time.monotonic() + config.wait, []
    while waiting:
        came = list(grid.pull_messages(list(waiting)))
        replies += came
        waiting -= {reply.metadata.reply_to_message_id for reply in came}
        if time.monotonic() > deadline:
            raise RunFailed(f"{total} answers must come within {config.wait:.0f} s, got {len(replies)}; raise wait, or look at the nodes' logs")
        if waiting and not came:
            time.sleep(POLL)
        if journal and came:
            journal.progress(f"{doing}: {len(replies)} of {total} clients")
    for reply in replies:
        who = client_of(reply.metadata.src_node_id)
        name = f"node {reply.metadata.src_node_id}" if who is None else f"client {who}"
        if reply.has_error():
            raise RunFailed(f"{name} failed: {_last_line(reply.error.reason)}")
        try:
            facts = facts_of(reply)
        except WireError as error:
            raise RunFailed(f"{name}: {error}") from None
        if "error" in facts:
            raise RunFailed(f"client {facts.get('client', '?')}: {facts['error']}")
    return sorted(replies, key=lambda reply: client_of(reply.metadata.src_node_id) or 0)


def _last_line(reason: str) -> str:
    lines = [line.strip() for line in (reason or "no reason given").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
