"""The whole algorithm as a plain for-loop, with neither Flower nor Ray: documentation, oracle, and the way to run on a
bare GPU machine. Its ledger counts header and payload of each adapter; what a transport adds, only Flower can tell.

    python -m simulations.loop clients=10 method=melo seed=1        Hydra overrides, as `flwr run` takes them
"""

from __future__ import annotations

import shlex
import sys
import time
from typing import Iterator, Sequence

from clients import blind, epochs, local, together
from clients.carried import Behind
from clients.keepsakes import keepsakes
from clients.link import arrived, leaving
from clients.state import StateError
from clients.together import Train
from fl.adapter import Adapter
from fl.config import Config, ConfigError, Node, build, load
from fl.datasets import DataError
from fl.durable import IntegrityError
from fl.journal import Journal, run_name
from fl.keys import KeyFileError
from fl.learn import TrainingError
from fl.models import WeightsError
from fl.provenance import code_digest
from fl.wire.coding import coding
from fl.wire.flat import WireError, unpack
from fl.wire.ledger import Entry, entry
from fl.wire.masks import SealError
from strategies import ClientInfo, Update
from strategies import blind as blind_server
from strategies.catchup import Catchup
from strategies.checkpoint import Checkpoints
from strategies.downlink import Downlink
from strategies.epochs import behind, furthest
from strategies.gate import Refused, admit, steps_of
from strategies.history import Evaluation, Watch, history_row, totals
from strategies.lengths import Lengths, reach
from strategies.plan import cohort, enough, evaluates, one_rank, orders, scores_own
from strategies.rollcall import Roll, RollCallError, agree, federation, remarks, same, summary
from strategies.talk import Answer, Question, QuorumLost, RunFailed, drive


def run(config: Config, journal: Journal, train: Train = local.train) -> dict:
    """Run the federation that ``config`` describes and return its summary; ``train`` is how its clients do, as `local.train`.

    Of clients that train by `local.train` as many as ``config.together`` says do so at once, where they are alike.
    """
    number = config.clients or 2
    nodes = [config.at_node(config.nodes.get(i, Node())) for i in range(number)]
    clients = [local.open_client(node, i, number) for i, node in enumerate(nodes)]
    rolls = [Roll(**local.roll(client)) for client in clients]
    for i in behind(rolls):
        rolls[i] = Roll(**epochs.catch_up(clients[i], {"epoch": furthest(rolls)}))
    agree(rolls, code_digest())
    for line in (*remarks(rolls), *together.remarks(config, clients, cohort(config, 1, number))):
        journal.say(line)
    try:
        return (blindly if config.blind else clearly)(config, journal, clients, rolls, train)
    finally:
        journal.close()


def clearly(config: Config, journal: Journal, clients: list[local.Client], rolls: list[Roll], train: Train) -> dict:
    """The run, with a server that sees each update. Nothing is tried again here: what fails ends it."""
    number, strategy, most = len(clients), build(config.strategy, recipe=config.recipe), at_once(config, train)
    infos = [ClientInfo(roll.client, roll.train, roll.evaluate, roll.rank) for roll in rolls]
    enough(strategy, config, number)
    one_rank(strategy, config, infos)
    start, catchup, wire = clients[0].bench.start, Catchup(strategy), coding(config)
    state, downlink = strategy.init(start), Downlink(wire, catchup, config.seed, start)
    journal.begin(number)
    keepsakes(clients[0], journal.folder)
    checkpoints = Checkpoints(journal.folder / "checkpoints", config, journal.say)
    done, kept = checkpoints.newest() if config.resume else (0, None)
    counted, lengths = dict(kept["counted"]) if done else {}, Lengths(config.gate.norm)
    if done:
        same(kept["federation"], rolls)
        state = kept["state"]
        catchup.recall(kept["catchup"]), downlink.recall(kept["downlink"]), lengths.recall(kept["lengths"])
    journal.rewind(done)

    for round in range(done + 1, config.rounds + 1):
        began, ledger, members = time.monotonic(), [], cohort(config, round, number)
        watch = Watch(few=len(members) <= config.diagnostics)

        def deliver(kind: str, i: int, upto: int, adapter: Adapter) -> Adapter:
            """What client i receives, its model standing on the base of round ``upto``; one that is behind is sent all of it."""
            for down, facts in downlink.messages(state, upto, i, adapter):
                ledger.append(entry(kind, "down", down.header, down.nbytes))
                try:
                    drawer = clients[i].drawer(journal.run)
                    if kind == "train":
                        drawer.tidy(checkpoints.safe(round))
                    received = arrived(drawer, wire, down, facts.get("link"), clients[i].bench.start, kind, round)
                    return local.settle(clients[i], received, journal.run, facts.get("base"))
                except Behind as behind:
                    journal.progress(str(behind))
            raise AssertionError("nobody is behind with the whole")

        def updates() -> Iterator[Update]:
            for some in together.companies(clients, members, most):
                journal.progress(f"round {round}/{config.rounds}: train {named(some)} of {number}")
                asked = [orders(strategy, config, state, round, infos[i]) for i in some]
                received = [(recipe, deliver("train", i, round - 1, given)) for i, (recipe, given) in zip(some, asked)]
                trained = together.train([clients[i] for i in some], round, received, scores_own(config, round), journal.run, train)
                for i, (recipe, given), (adapter, examples, metrics) in zip(some, asked, trained):
                    up = leaving(clients[i].drawer(journal.run), wire, config.seed, round, adapter)
                    whole = reach(recipe, given, steps_of(recipe, infos[i]))
                    update = Update(i, unpack(up, wire.differences), examples, metrics)
                    lengths.see(admit(update, recipe.sent(given), infos[i], lengths.longest(whole), recipe).adapter, whole)
                    ledger.append(entry("train", "up", up.header, up.nbytes))
                    yield watch.see(given, update)

        state = strategy.apply(state, round, updates())
        lengths.commit()

        scores = []
        if evaluates(config, round):
            view = strategy.view(state)
            scores = [Evaluation(c.index, *local.score(c, deliver("evaluate", c.index, round, view))) for c in clients]
        row = history_row(round, watch, scores, ledger, time.monotonic() - began)
        journal.round(row)
        counted |= dict.fromkeys(members, round)
        tree = {"state": state, "catchup": catchup.kept(), "downlink": downlink.kept(), "federation": federation(rolls)}
        tree |= {"counted": counted, "lengths": lengths.kept(), "before": []}  # which Flower's server needs, should it go on with this
        checkpoints.commit(round, tree, row.get("accuracy"))

    checkpoints.end()
    told = journal.finish(summary(rolls) | totals(journal.rounds, rolls[0].full_bytes), catchup.whole(state, strategy.view(state)))
    return journal.conclude(told)


def blindly(config: Config, journal: Journal, clients: list[local.Client], rolls: list[Roll], train: Train) -> dict:
    """The run, with a server that can read nothing (`strategies.blind`): here is only who asks whom."""
    ledger: list[Entry] = []
    work = {"train": blind.ask, "evaluate": blind.evaluate, "report": blind.report, "end": epochs.end}

    def reached(question: Question, i: int) -> Iterator[tuple[dict, tuple]]:
        """The facts of the first message that client i is not behind, and what it makes of it; nothing where it is behind all."""
        for down, facts in question.messages[i]:
            ledger.append(entry(question.kind, "down", down.header, down.nbytes))
            try:
                yield facts, work[question.kind](clients[i], facts, down)
                return
            except Behind as behind:
                journal.progress(str(behind))

    def answers(question: Question) -> Iterator[Answer]:
        trains = question.kind == "train"
        for some in together.companies(clients, question.messages, at_once(config, train) if trains else 1):
            journal.progress(f"round {question.round}/{config.rounds}: {question.kind} {named(some)} of {len(clients)}")
            found = {i: what for i in some for what in reached(question, i)}
            if trains and found:
                here = [clients[i] for i in found]
                trained = together.train(here, question.round, [asked[1:] for _, asked in found.values()], False, journal.run, train)
                for (i, (facts, asked)), one in zip(list(found.items()), trained):
                    found[i] = facts, blind.answer(clients[i], facts, asked, one)
            for i, (_, (said, up)) in found.items():
                if up:
                    ledger.append(entry(question.kind, "up", up.header, up.nbytes))
                yield Answer(i, said, up)

    talk = blind_server.federate(config, journal, rolls, clients[0].bench.start, ledger)
    keepsakes(clients[0], journal.folder)
    return drive(talk, answers)


def at_once(config: Config, train: Train) -> int:
    """How many clients may train at once: those of one's own way to ``train`` one by one."""
    return config.together if train is local.train else 1


def named(some: Sequence[int]) -> str:
    """Who trains, in the line of progress."""
    return f"client {some[0]}" if len(some) == 1 else f"clients {some[0]} to {some[-1]}"


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status.

    0 ok, 2 a config, key, data or weights that cannot run, 4 a run that failed, 5 a quorum that was lost, 6 checkpoints that
    are damaged, 130 an end from the keyboard.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    try:
        config = load(shlex.join(arguments))
        journal = Journal(config, run_name(config), driver="loop", overrides=shlex.join(arguments))
        if journal.finished:
            journal.say(f"{journal.run} is finished; there is nothing to resume")
            return 0
        run(config, journal)
    except (ConfigError, KeyFileError, DataError, WeightsError) as error:
        return failed(error, 2)
    except QuorumLost as error:
        return failed(error, 5)
    except IntegrityError as error:
        return failed(error, 6)
    except (RollCallError, RunFailed, Refused, TrainingError, StateError, SealError, WireError, OSError) as error:
        return failed(error, 4)
    except KeyboardInterrupt:
        return failed(f"stopped; go on with the same words and resume={journal.run}", 130)
    return 0


def failed(reason: object, status: int) -> int:
    """Say why in a line; returns the exit ``status``."""
    print(f"error: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
