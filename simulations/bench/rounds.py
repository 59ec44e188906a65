"""A round in which the clients do nothing: what an engine takes for itself, by the wall.

The same app (echo/) runs in this process and on Ray. The last rows are a round as `strategies.flower` makes it, in this
process: pack, message, weigh, exchange, unpack, gate, mean; what the engine takes is then a part of our own.
"""

from __future__ import annotations

import statistics
import time
from typing import Callable, Iterator

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl.adapter import average, flat
from fl.flat import Flat
from fl.recipe import Recipe
from fl.wire.flat import packer
from fl.wire.float32 import float32
from fl.wire.records import packed_of, to_content
from simulations.bench.apps import report
from simulations.bench.echo.client_app import app as echo
from simulations.bench.echo.server_app import once
from simulations.bench.machine import machine
from simulations.bench.memory import apart, growth
from simulations.bench.pairs import Spread, spread
from simulations.bench.report import Check, Options, Row, Section
from simulations.inprocess import InProcessGrid
from simulations.launch import engine
from strategies import ClientInfo, Update
from strategies.exchange import exchange
from strategies.flower import answer_of, message, weigh
from strategies.gate import admit, most, update_of
from strategies.history import Watch

VALUES = 95_000  # float32 in a payload: 0.38 MB
COHORT = 100


def run(options: Options) -> list[Section]:
    """The table; --quick leaves Ray and 10,000 clients out."""
    repeats = 1 if options.quick else options.pairs
    ray = [] if options.quick else on_ray(COHORT, repeats)
    rows = [row("Flower on Ray with 2 workers", COHORT, ray, None, [])] if ray else []
    at_hundred = 0.0
    for clients in (COHORT, 1000) if options.quick else (COHORT, 1000, 10_000):
        seconds, memory = apart(measured, echoes, clients, repeats)
        each = statistics.median(seconds) / clients
        at_hundred = at_hundred or each
        less = spread([r / s for r, s in zip(ray, seconds)]) if ray and clients == COHORT else None
        checks = [Check(less.median, ">=", 20, "x less than Ray")] if less else []
        if clients > COHORT:  # at a hundred, what is allocated once still weighs
            checks += [Check(memory / clients / 1000, "<=", 64, " kB a client"), Check(each / at_hundred, "<=", 1.1, "x linear")]
        rows.append(row("in process", clients, seconds, less, checks))
    for clients in (COHORT, 1000):
        seconds, _ = apart(measured, full_rounds, clients, repeats)
        rows.append(row("in process, with all the server's work", clients, seconds, None, []))
    return [Section("rounds", f"one round of clients that echo {4 * VALUES / 1e6:.2f} MB, wall", "Flower on Ray", rows)]


def row(name: str, clients: int, seconds: list[float], less: Spread | None, checks: list[Check]) -> Row:
    """A row of ``clients``; a thousand of them have a target of their own."""
    middle, copies = statistics.median(seconds), 2 * 4 * VALUES / machine().copy
    own = [Check(middle, "<=", 1, " s")] if clients == 1000 else []
    limit = f"{1e3 * middle / clients:.3f} ms a client; to copy its payload both ways {1e3 * copies:.3f} ms"
    return Row(f"{name}, {clients:,} clients", middle, "s", less, limit, (*own, *checks))


def on_ray(clients: int, repeats: int) -> list[float]:
    """Wall seconds of each steady round on Ray with two workers; the first round, which starts them, is left out."""
    with engine() as own:
        return report(own, "echo", clients, 2, {"values": VALUES, "rounds": repeats + 1})[1:]


def measured(work: Callable[[int, int], list[float]], clients: int, repeats: int) -> tuple[list[float], int]:
    """The seconds of ``work(clients, repeats)`` and the bytes that it adds at its peak; to be called in a fresh process."""
    torch.set_num_threads(1)
    work(10, 1)
    return growth(lambda: work(clients, repeats))


def echoes(clients: int, repeats: int) -> list[float]:
    """Rounds of the echo app; the grid is made anew, since a round of a run makes it once."""
    grid = InProcessGrid(echo, clients, {})
    return [once(grid, VALUES) for _ in range(repeats)]


def full_rounds(clients: int, repeats: int) -> list[float]:
    """Rounds as `strategies.flower.federate` makes them, with clients that send the adapter back as their update."""
    grid = InProcessGrid(updating(), clients, {})
    number = {node: i for i, node in enumerate(grid.get_node_ids())}
    given, recipe = flat({"blocks.0.attn.qkv.q.lora_a.weight": torch.zeros(VALUES)}), Recipe(lr={"lora_a": 1e-3})
    return [one_round(grid, number, given, recipe) for _ in range(repeats)]


def one_round(grid: InProcessGrid, number: dict[int, int], given: Flat, recipe: Recipe) -> float:
    """Wall seconds of a round over all nodes."""
    began, codec = time.monotonic(), float32()
    pack_once, messages, ledger = packer(codec), [], []
    for node in number:
        messages.append(message("train", node, 1, {"round": 1, "recipe": recipe.to_json()}, pack_once(given)))
        ledger.append(weigh("train", "down", messages[-1]))
    watch, bound = Watch(few=False), most(given)

    def updates() -> Iterator[Update]:
        for reply in exchange(grid, 60, messages, number):
            answer = answer_of(number[reply.metadata.src_node_id], reply, bound)
            ledger.append(weigh("train", "up", reply))
            update = update_of(answer.client, answer.facts, answer.packed, codec, given)
            yield watch.see(given, admit(update, recipe.sent(given), ClientInfo(answer.client, 1)))

    average((u.adapter, u.examples) for u in updates())
    return time.monotonic() - began


def updating() -> ClientApp:
    """A client that sends back what it received, as an update of one image."""
    app = ClientApp()

    @app.train()
    def train(received: Message, context: Context) -> Message:
        metrics = {"loss": 0.0, "steps": 1, "seconds": 0.0}
        return Message(to_content({"examples": 1, "metrics": metrics}, packed_of(received)), reply_to=received)

    return app
