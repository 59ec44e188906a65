"""The Flower ClientApp: the thin edge around `clients.local`. It runs unchanged in simulation and on an edge node.

It answers three messages: ``query`` (the roll call, and the initial adapter where asked), ``train``, ``evaluate``. It judges
them as the server judges its answers (`clients.gate`), and an answer says of which run, round and config it is.
A node's own settings come from Flower's node config: ``partition-id``, ``num-partitions``, and where it differs from the
run's config ``key-path``, ``data-path``, ``partition-path``, ``weights-path``, ``state-path``, ``device``, ``rank``.
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

from clients import blind, carried, expected, gate, link, local
from clients.carried import CONTROL, PERSONAL, Behind
from clients.keepsakes import keepsakes
from clients.state import StateError
from fl.adapter import Adapter
from fl.config import Config, ConfigError, Node, load, node
from fl.datasets import DataError
from fl.keys import KeyFileError
from fl.learn import TrainingError
from fl.models import WeightsError
from fl.provenance import ROOT
from fl.wire.coding import WHOLE, coding
from fl.wire.flat import Packed, WireError, pack
from fl.wire.masks import SealError
from fl.wire.records import facts_of, packed_of, to_content

if "ray" in sys.modules or "flwr.simulation.app" in sys.modules:
    # Ray's workers import from the driver's working directory before anything else, and that is wherever the engine was
    # first started. The bundle that this file came in is the code of this run.
    os.chdir(ROOT)

app = ClientApp()
log = logging.getLogger("veilora.client")

NODE_SETTINGS = {
    "key-path": "key", "data-path": "data_root", "weights-path": "weights", "partition-path": "own", "state-path": "state",
    "device": "device", "rank": "rank",
}  # fmt: skip
EXPECTED = (ConfigError, KeyFileError, DataError, WeightsError, TrainingError, WireError, StateError, SealError, OSError)


def answer(work: Callable[[local.Client, Message], tuple[dict, Packed | None]]) -> Callable[[Message, Context], Message]:
    """Wrap ``work`` as a Flower handler: open the client, and turn what the user can mend into one line for the server.

    That line leaves the machine, so the paths in it are replaced by the names of their settings; the log keeps them. Of what
    nobody foresaw the server is told the kind alone: a text might hold anything.
    """

    def handler(message: Message, context: Context) -> Message:
        config, index = None, None
        try:
            index, of = place(context)
            config = at_node(context, index)
            facts, packed = work(local.open_client(config, index, of), message)
        except Behind:
            facts, packed = {"behind": True}, None
        except EXPECTED as error:
            log.error("%s", error)
            says = unnamed(error, config) if isinstance(error, OSError) else without_paths(str(error), config)
            facts, packed = {"error": says, "client": index}, None
        except Exception as error:
            log.exception("a fault inside")
            facts, packed = {"error": f"it failed inside ({type(error).__name__}); look at its log", "client": index}, None
        return Message(to_content(facts, packed), reply_to=message)

    return handler


def place(context: Context) -> tuple[int, int]:
    """This node's number and how many there are. Raises ConfigError when its node config does not say."""
    try:
        index, of = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    except (KeyError, TypeError, ValueError):
        index, of = -1, -1
    if not 0 <= index < of:
        raise ConfigError("a node must know its place; start it with --node-config 'partition-id=I num-partitions=N', 0 <= I < N")
    return index, of


def at_node(context: Context, index: int) -> Config:
    """The run's config as this node sees it."""
    config = load(str(context.run_config.get("overrides", "")))
    simulated = config.nodes.get(index, Node())
    own = {field: str(context.node_config[name]) for name, field in NODE_SETTINGS.items() if name in context.node_config}
    return config.at_node(simulated).at_node(node(own))


def without_paths(text: str, config: Config | None) -> str:
    """``text`` with this machine's paths replaced by the names of the settings that hold them."""
    places = {} if config is None else {
        "data.root": config.data.get("root", ""),
        "model.weights": config.model.get("weights", ""),
        "key": config.key,
        "output": config.output,
        "state": config.state,
        "own": config.own or "",
    }
    paths = {form: f"<{name}>" for name, where in places.items() for form in (str(Path(str(where)).expanduser()), str(where))}
    for path in sorted(paths, key=len, reverse=True):  # what lies in another's folder goes by its own name
        if len(path) > 1 and "/" in path:
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?!\w)", paths[path], text)
    text = re.sub(r"""(['"])[^'"]*/[^'"]*\1""", "<path>", text)
    text = re.sub(r"(<[\w.]+>)/\S*", r"\1/...", text)
    return re.sub(r"(?<![\w.~<>:/])~?(/[\w.~+@-]+){2,}/?", "<path>", text)


def unnamed(error: OSError, config: Config | None) -> str:
    """What went wrong with a file, and in which setting's place, but not the file: its name may be a person's."""
    place = without_paths(str(error.filename), config).partition("/")[0] if error.filename else ""
    return (f"{place}: " if place.startswith("<") else "") + (error.strerror or type(error).__name__)


@app.query()
@answer
def query(client: local.Client, message: Message) -> tuple[dict, Packed | None]:
    """The roll call; the first client also keeps a preview and the split, on its own machine. In a blind run, a report."""
    wish = facts_of(message)
    if client.config.blind and "upto" in wish:
        gate.mark(wish, client.config), gate.span(wish, client.config)
        return blind.report(client, wish, received_in(client, message))
    if wish.get("start"):
        return {}, pack(client.bench.start, WHOLE)
    run = str(wish.get("run", ""))
    if client.index == 0 and re.fullmatch(r"[a-z0-9_-]+", run):
        keepsakes(client, Path(client.config.output).expanduser() / run)
    return local.roll(client), None


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
    return {**mark, "examples": examples, "metrics": metrics}, packed


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
