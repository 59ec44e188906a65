"""The Flower ClientApp: the thin edge around `clients.local`. It runs unchanged in simulation and on an edge node.

It answers three messages: ``train``, ``evaluate``, and ``query``, which is the roll call or asks for the initial adapter, for
the signature of a record's end, or in a blind run for a report or a step of the seal key. It judges them as the server judges
its answers (`clients.gate`), and an answer says of which run, round and config it is.
A node's own settings come from Flower's node config: ``partition-id``, ``num-partitions``, and where it differs from the
run's config ``key-path``, ``seal-key-path``, ``data-path``, ``partition-path``, ``weights-path``, ``state-path``,
``output-path``, ``node-key-path``, ``device``, ``rank``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients import blind, carried, epochs, expected, failure, gate, link, local, policy, witness
from clients.carried import CONTROL, PERSONAL, Behind
from clients.keepsakes import keepsakes
from fl.adapter import Adapter
from fl.config import Config, ConfigError, Node, load, node
from fl.provenance import ROOT
from fl.wire.coding import WHOLE, coding
from fl.wire.flat import Packed, pack
from fl.wire.records import facts_of, packed_of, to_content

if "ray" in sys.modules or "flwr.simulation.app" in sys.modules:
    # Ray's workers import from the driver's working directory before anything else, and that is wherever the engine was
    # first started. The bundle that this file came in is the code of this run.
    os.chdir(ROOT)

app = ClientApp()
log = logging.getLogger("veilora.client")

NODE_SETTINGS = {
    "key-path": "key", "seal-key-path": "seal_key", "data-path": "data_root", "weights-path": "weights", "partition-path": "own",
    "state-path": "state", "output-path": "output", "device": "device", "rank": "rank", "node-key-path": "node_key",
}  # fmt: skip


def answer(work: Callable[[local.Client, Message], tuple[dict, Packed | None]]) -> Callable[[Message, Context], Message]:
    """Wrap ``work`` as a Flower handler: open the client, and turn what the user can mend into one line for the server.

    That line leaves the machine: `clients.failure` says what may be in it. The log has the rest.
    """

    def handler(message: Message, context: Context) -> Message:
        config, index = None, None
        try:
            index, of = place(context)
            config = at_node(context, index)
            content = to_content(*work(local.open_client(config, index, of), message))
        except Behind:
            content = to_content({"behind": True})
        except Exception as error:
            log.error("%s", error, exc_info=not isinstance(error, failure.EXPECTED))
            content = to_content({"error": failure.says(error, config), "client": index})
        return Message(content, reply_to=message)

    return handler


def place(context: Context) -> tuple[int, int]:
    """This node's number and how many there are. Raises ConfigError when its node config does not say."""
    try:
        index, of = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    except (KeyError, TypeError, ValueError):
        index, of = -1, -1
    if not 0 <= index < of:
        says = "a node must know its place; start it with --node-config 'partition-id=I num-partitions=N', 0 <= I < N"
        raise ConfigError(says, "partition-id", "num-partitions")
    return index, of


def at_node(context: Context, index: int) -> Config:
    """The run's config as this node sees it."""
    config = load(str(context.run_config.get("overrides", "")))
    simulated = config.nodes.get(index, Node())
    own = {field: str(context.node_config[name]) for name, field in NODE_SETTINGS.items() if name in context.node_config}
    return config.at_node(simulated).at_node(node(own))


@app.query()
@answer
def query(client: local.Client, message: Message) -> tuple[dict, Packed | None]:
    """The roll call; the first client also keeps a preview and the split, on its own machine. In a blind run, a report."""
    wish = facts_of(message)
    under = {"policy": policy.in_force.get(), "signer": witness.public(client.config)}
    if wish.get("closing"):
        gate.mark(wish, client.config)
        return (blind.close if client.config.blind else witness.attest)(client, wish), None
    if client.config.blind and "upto" in wish:
        gate.mark(wish, client.config), gate.span(wish, client.config)
        return blind.report(client, wish, received_in(client, message), lambda error: failure.says(error, client.config))
    if client.config.blind and "epoch" in wish:
        return epochs.end(client, wish) if "end" in wish else (epochs.catch_up(client, wish) | under, None)
    if wish.get("start"):
        return {}, pack(client.bench.start, WHOLE)
    run, roll = str(wish.get("run", "")), local.roll(client) | under
    if client.index == 0 and re.fullmatch(r"[a-z0-9_-]{1,128}", run):
        roll["kept"] = keepsakes(client, Path(client.config.output).expanduser() / run)
    return roll, None


@app.train()
@answer
def train(client: local.Client, message: Message) -> tuple[dict, Packed | None]:
    """One round of training: the difference, the number of images, what the training was like."""
    facts = facts_of(message)
    if client.config.blind:
        gate.mark(facts, client.config), gate.span(facts, client.config)
        return blind.train(client, facts, received_in(client, message))
    mark, (safe, counted) = gate.mark(facts, client.config), gate.past(facts)
    run, round, drawer = mark["run"], mark["round"], client.drawer(mark["run"])
    recipe = expected.order(client, facts, round)
    drawer.tidy(safe)
    drawer.rewind(counted, PERSONAL, CONTROL, link.LOST)
    carried.present(drawer, recipe, counted)
    received = arrived(client, message, "train")
    update, examples, metrics = local.train(client, round, recipe, received, bool(facts["scored"]), run)
    packed = link.leaving(drawer, coding(client.config), client.config.seed, round, update)
    return {**mark, **witness.attest(client, facts), "examples": examples, "metrics": metrics}, packed


@app.evaluate()
@answer
def evaluate(client: local.Client, message: Message) -> tuple[dict, Packed | None]:
    """Evaluate the adapter on this client's own shard: sums and counts."""
    facts = facts_of(message)
    mark = gate.mark(facts, client.config)
    if client.config.blind:
        gate.span(facts, client.config)
        return blind.evaluate(client, facts, received_in(client, message))
    return {**mark, **local.score(client, arrived(client, message, "evaluate"))._asdict()}, None


def received_in(client: local.Client, message: Message) -> Packed:
    """What ``message`` carries, measured before it is decoded."""
    return packed_of(message, 2 * client.bench.full_bytes + gate.SLACK)


def arrived(client: local.Client, message: Message, kind: str) -> Adapter:
    """The adapter in ``message``, judged before it is decoded and after, the model standing on the base that it means."""
    facts = facts_of(message)
    run, round, wire, start = str(facts["run"]), int(facts["round"]), coding(client.config), client.bench.start
    packed = received_in(client, message)
    expected.shaped(client, packed.shapes(), kind, round)
    received = gate.finite(link.arrived(client.drawer(run), wire, packed, facts.get("link"), start, kind, round))
    if kind == "train" and round == 1:
        expected.begun(client, received)
    return local.settle(client, received, run, facts.get("base"))
