"""The whole algorithm as a plain for-loop, with neither Flower nor Ray: documentation, oracle, and the way to run on a
bare GPU machine. Its ledger counts header and payload of each adapter; what a transport adds, only Flower can tell.

    python -m simulations.loop clients=10 method=melo seed=1        Hydra overrides, as `flwr run` takes them
"""

from __future__ import annotations

import shlex
import sys
import time
from typing import Iterator

from clients import local
from fl.adapter import part
from fl.config import Config, ConfigError, Node, build, load
from fl.datasets import DataError
from fl.journal import Journal, run_name
from fl.keys import KeyFileError
from fl.learn import TrainingError
from fl.models import WeightsError
from fl.provenance import code_digest
from fl.wire.flat import pack, packer, unpack
from fl.wire.float32 import float32
from fl.wire.ledger import entry
from strategies import ClientInfo, Update
from strategies.gate import Refused, admit
from strategies.history import Evaluation, Watch, history_row, totals
from strategies.plan import cohort, enough, evaluates, one_rank, orders, scores_own
from strategies.rollcall import Roll, RollCallError, agree, remarks, summary


def run(config: Config, journal: Journal) -> dict:
    """Run the federation that ``config`` describes and return its summary."""
    codec = float32()
    pack_once = packer(codec)
    number = config.clients or 2
    nodes = [config.at_node(config.nodes.get(i, Node())) for i in range(number)]
    clients = [local.open_client(node, i, number) for i, node in enumerate(nodes)]
    rolls = [Roll(**local.roll(client)) for client in clients]
    agree(rolls, code_digest())
    for line in remarks(rolls):
        journal.say(line)
    strategy = build(config.strategy, recipe=config.recipe)
    infos = [ClientInfo(roll.client, roll.train, roll.evaluate, roll.rank) for roll in rolls]
    enough(strategy, config, number)
    one_rank(strategy, config, infos)
    journal.begin()
    local.keepsakes(clients[0], journal.folder)
    state = strategy.init(clients[0].bench.start)

    for round in range(1, config.rounds + 1):
        began, ledger, members = time.monotonic(), [], cohort(config, round, number)
        watch = Watch(few=len(members) <= config.diagnostics)

        def updates() -> Iterator[Update]:
            for i in members:
                journal.progress(f"round {round}/{config.rounds}: client {i} of {number} trains")
                recipe, given = orders(strategy, config, state, round, infos[i])
                down = pack_once(given)
                adapter, examples, metrics = local.train(clients[i], round, recipe, unpack(down, codec), scores_own(config, round))
                up = pack(adapter, codec)
                update = admit(Update(i, unpack(up, codec), examples, metrics), part(given, recipe.groups), infos[i])
                ledger.extend((entry("train", "down", down.header, down.nbytes), entry("train", "up", up.header, up.nbytes)))
                yield watch.see(given, update)

        state = strategy.apply(state, round, updates())

        scores = []
        if evaluates(config, round):
            down = pack_once(strategy.view(state))
            scores = [Evaluation(c.index, *local.score(c, unpack(down, codec))) for c in clients]
            ledger += [entry("evaluate", "down", down.header, down.nbytes) for _ in clients]
        journal.round(history_row(round, watch, scores, ledger, time.monotonic() - began))

    return journal.finish(summary(rolls) | totals(journal.rounds, rolls[0].full_bytes), strategy.view(state))


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status: 0 ok, 2 a config, key, data or weights that cannot run, 4 a run that failed."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    try:
        config = load(shlex.join(arguments))
        journal = Journal(config, run_name(config))
        run(config, journal)
    except (ConfigError, KeyFileError, DataError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RollCallError, Refused, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
