"""Blind clients asked by a server that lies: it picks subsets, hands out old or altered sums, names other rounds, and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_simulation import home, settings  # noqa: F401

from clients import blind, local
from clients.notes import Notes
from fl.adapter import count
from fl.config import load
from fl.wire import sealed
from fl.wire.flat import WireError, pack, unpack
from fl.wire.masks import SealError
from fl.wire.octets import octets
from fl.wire.sealed import Sealed, Total, add
from strategies.memory import Memory
from strategies.plan import cohort, teller
from strategies.rollcall import faults, remarks, roll_in, summary

FIVE = "blind=true seal.largest=200 clients=5 rounds=5"
ALL = range(5)


class Server:
    """One who has five blind clients at hand and asks of them what it likes; ``sums`` is what it hands out, by round."""

    def __init__(self, home, out, run: str = "run", *more: str) -> None:  # noqa: F811
        self.config = load(settings(home, out, FIVE, *more))
        self.clients, self.run = [local.open_client(self.config, k, 5) for k in ALL], run
        self.memory = Memory(run, self.config.digest())
        self.size = count(self.clients[0].bench.start)

    def ask(self, kind: str, client: int, round: int, memory: Memory | None = None, scores: Total | None = None, **facts):
        """What ``client`` answers."""
        work = {"train": blind.train, "evaluate": blind.evaluate, "report": blind.report}[kind]
        memory = memory or self.memory
        packed, told = next(memory.messages(client, round - (kind == "train"), {"round": round, **facts}))
        if scores:
            packed = pack({**unpack(packed, octets()), **sealed.named("scores", scores)}, octets())
        return work(self.clients[client], {**told, **facts}, packed)

    def messages(self, kind: str, round: int, clients=ALL) -> list[Sealed]:
        """The sealed messages of ``clients``."""
        came = [(k, unpack(self.ask(kind, k, round)[1], octets())) for k in clients]
        return [sealed_of(k, message) for k, message in came]

    def view(self, total: Total, round: int = 1) -> Memory:
        """What the clients are shown whose world has ``total`` as the sum of ``round``."""
        memory = Memory(self.run, self.config.digest())
        memory.sums = {r: t for r, t in self.memory.sums.items() if r < round} | {round: total}
        return memory


def sealed_of(client: int, message) -> Sealed:
    """A client's message as a server takes it in."""
    nonce, payload, echo = (message[f"sealed.{part}"].numpy() for part in ("nonce", "payload", "echo"))
    return Sealed(client, nonce.tobytes(), payload, echo.tobytes())


@pytest.fixture
def server(home, tmp_path) -> Server:  # noqa: F811
    return Server(home, tmp_path)


def test_numbers_of_one_list_are_told_by_one_client_and_those_of_any_other_never(server):
    messages = server.messages("train", 1)
    whole, fewer = add(messages, server.size, 32), [add(messages[:k] + messages[k + 1 :], server.size, 32) for k in ALL]
    (one,) = [k for k in ALL if server.ask("report", k, 1, server.view(whole))[0]]
    assert one == teller(server.config, 1, ALL)
    told = server.ask("report", one, 1, server.view(whole))[0]
    assert set(told) == {"train_loss"} and told["train_loss"] == round(told["train_loss"], 2)
    assert server.ask("report", one, 1, server.view(whole))[0] == told  # the same list, asked again: the same numbers
    assert [server.ask("report", k, 1, server.view(total))[0] for total in fewer for k in ALL] == [{}] * 25


def test_where_all_must_be_in_a_sum_a_model_that_never_moves_gives_no_two_lists_to_subtract(home, tmp_path):  # noqa: F811
    still = Server(home, tmp_path, "still", "recipe.lr={lora_a:0,lora_b:0,lora_r:0,head:0,patch_embed:0,backbone:0} quorum=1")
    for round, away in enumerate((None, 0, 1), 1):
        still.memory.add(round, add(still.messages("train", round), still.size, 32))
        scores = [m for m in still.messages("evaluate", round) if m.client != away]
        told = still.ask("report", teller(still.config, round, ALL), round, scores=add(scores, 1, 32))[0]
        assert set(told) == ({"accuracy", "loss"} if away is None else set())


def test_scores_of_one_list_are_told_by_one_client_and_those_of_any_other_never(server):
    server.memory.add(1, add(server.messages("train", 1), server.size, 32))
    one = teller(server.config, 1, ALL)
    scores = server.messages("evaluate", 1)
    sums = [add(scores, 1, 32), *(add(scores[:k] + scores[k + 1 :], 1, 32) for k in ALL)]
    answers = [[server.ask("report", k, 1, scores=total)[0] for k in ALL] for total in sums]
    assert set(answers[0][one]) == {"accuracy", "loss"} and sum(map(bool, sum(answers, []))) == 1


@pytest.mark.parametrize("members", [(0,), (2, 3)])
def test_sums_of_one_or_two_do_not_open_and_nothing_is_told_of_them(server, members):
    some = add(server.messages("train", 1, members), server.size, 32)
    answers = [server.ask("report", k, 1, server.view(some))[0] for k in ALL]
    assert answers == [{"refused": f"a sum must be of 3 to 5 different clients, got {list(members)}"}] * 5
    server.memory.add(1, add(server.messages("train", 1), server.size, 32))
    few = add(server.messages("evaluate", 1, members), 1, 32)
    assert all("a sum must be of 3 to 5" in server.ask("report", k, 1, scores=few)[0]["refused"] for k in ALL)


def test_below_the_quorum_of_those_asked_nothing_is_told(server):
    messages = server.messages("train", 1)
    some = add(messages[:4], server.size, 32)  # a quorum of 1.0 of five is five; with 0.8 it would be told
    assert all(server.ask("report", k, 1, server.view(some))[0] == {} for k in ALL)


def test_a_sum_is_of_the_rounds_own_cohort_and_of_nobody_whom_the_server_adds(home, tmp_path):  # noqa: F811
    server = Server(home, tmp_path, "run", "fraction=0.8")
    members = cohort(server.config, 1, 5)
    (away,) = set(ALL) - set(members)
    messages = server.messages("train", 1)
    chosen = [m for m in messages if m.client != members[0]]
    says = f"the sum of round 1 must be of that round's cohort, got [{away}], too"
    assert all(server.ask("report", k, 1, server.view(add(chosen, server.size, 32)))[0] == {"refused": says} for k in ALL)
    honest = server.view(add([m for m in messages if m.client != away], server.size, 32))
    assert all("refused" not in server.ask("report", k, 1, honest)[0] for k in ALL)


def test_after_three_sums_of_a_round_that_do_not_open_a_client_takes_no_further_part(home, tmp_path, server):  # noqa: F811
    whole = add(server.messages("train", 1), server.size, 32)
    for bit in range(3):
        payload = whole.payload.copy()
        payload[bit] ^= 4
        assert "does not carry the tag" in server.ask("report", 1, 1, server.view(whole._replace(payload=payload)))[0]["refused"]
    server.memory.add(1, whole)
    says = "3 sums of round 1 did not open, so this client takes no further part in the run"
    assert server.ask("report", 1, 1)[0] == {"refused": says}
    for kind, round in (("train", 1), ("train", 2), ("evaluate", 1)):
        with pytest.raises(SealError, match=says):
            server.ask(kind, 1, round)
    assert Notes(server.clients[1].drawer("run")).stopped == says  # on the disk: a restart forgets nothing
    assert set(server.ask("report", 0, 1)[0]) <= {"train_loss"}
    assert len(Server(home, tmp_path, "another").messages("train", 1)) == 5


def test_two_sums_that_do_not_open_in_each_of_two_rounds_are_no_reason_to_stop(server):
    for round in (1, 2):
        whole = add(server.messages("train", round), server.size, 32)
        for bit in range(2):
            payload = whole.payload.copy()
            payload[bit] ^= 4
            assert "refused" in server.ask("report", 1, round, server.view(whole._replace(payload=payload), round))[0]
        server.memory.add(round, whole)
    assert "refused" not in server.ask("report", 1, 2)[0]


def test_clients_of_two_histories_open_nothing_of_each_other(server):
    """Two groups are shown two sums; in the next round no sum of both opens to either, and each says why."""
    messages = server.messages("train", 1)
    views = [server.view(add(messages[k : k + 3], server.size, 32)) for k in (0, 2)]
    for client in ALL:
        server.ask("evaluate", client, 1, views[client % 2])
    split = [unpack(server.ask("train", k, 2, views[k % 2])[1], octets()) for k in ALL]
    mixed = add([sealed_of(k, message) for k, message in enumerate(split)], server.size, 32)
    for client in ALL:
        view = views[client % 2]
        view.add(2, mixed)
        assert server.ask("report", client, 2, view)[0] == {"refused": "transcript: two views"}


def test_an_old_state_under_the_name_of_a_newer_round_is_refused(server):
    for round in (1, 2):
        server.memory.add(round, add(server.messages("train", round), server.size, 32))
    old = unpack(server.ask("report", 0, 1, server.view(server.memory.sums[1]), state=True)[1], octets())["sealed.state"]
    packed = pack({"sealed.state": old}, octets())
    facts = {"run": "run", "config": server.config.digest(), "safe": 0}
    assert blind.stand(server.clients[3], {**facts, "since": 1, "upto": 1}, packed).round == 1
    with pytest.raises(SealError, match="the state of round 2 must be as a client locked it"):
        blind.stand(server.clients[3], {**facts, "since": 2, "upto": 2}, packed)


def test_the_round_of_an_order_is_that_of_its_sums_and_no_other(server):
    server.memory.add(1, add(server.messages("train", 1), server.size, 32))
    packed, facts = next(server.memory.messages(0, 1, {}))
    for work, round in ((blind.train, 1), (blind.train, 3), (blind.evaluate, 2), (blind.report, 2), (blind.report, None)):
        with pytest.raises(WireError, match="an order must be of the round that follows from its sums"):
            work(server.clients[0], {**facts, "round": round}, packed)
    gap = pack({n: t for n, t in unpack(packed, octets()).items() if "members" not in n}, octets())
    with pytest.raises(WireError, match="a sum must come with its members and its payload"):
        blind.evaluate(server.clients[0], {**facts, "round": 1}, gap)


# The roll call --------------------------------------------------------------------------------------------------------


def test_a_blind_roll_call_tells_no_count_whatever_seal_largest_is(home, tmp_path):  # noqa: F811
    """Thirteen roll calls by bisection told a client's count: now all are alike."""
    rolls = [local.roll(Server(home, tmp_path, "run", f"seal.largest={n}").clients[0]) for n in (1, 2, 31, 32, 33, 64, 10_000)]
    for roll in rolls:
        roll["digests"].pop("config")
    assert all(roll == rolls[0] for roll in rolls) and rolls[0]["train"] is rolls[0]["evaluate"] is None


def test_a_client_of_more_images_than_seal_largest_says_so_in_its_own_log_alone(home, tmp_path, caplog):  # noqa: F811
    server = Server(home, tmp_path, "run", "seal.largest=3")
    messages = server.messages("train", 1)
    assert "this client has more images than seal.largest=3, and weighs as one of so many" in caplog.text
    server.memory.add(1, add(messages, server.size, 32))
    assert "refused" not in server.ask("report", 0, 1)[0]


def test_faults_of_a_blind_client_are_yes_or_no(home, tmp_path, server):  # noqa: F811
    client = server.clients[0]
    found = {"train converted": 137_137_137, "test skipped": 2}
    grey = local.Client(**{**vars(client), "holdings": client.holdings._replace(faults=found)})
    roll = roll_in(local.roll(grey))
    assert roll.faults == {"train converted": True, "test skipped": True} and "137137137" not in repr(roll)
    assert remarks([roll])[1:] == ["data: some images train converted", "data: some images test skipped"]
    other = roll._replace(client=1, faults={})
    assert faults([roll, other]) == {"train converted (client 0)": True, "test skipped (client 0)": True} == summary([roll, other])["faults"]
    clear = local.Client(**{**vars(grey), "config": load(settings(home, tmp_path, FIVE, "blind=false"))})
    assert local.roll(clear)["faults"] == found


def test_what_a_blind_client_keeps_holds_who_was_in_the_sum_and_the_transcript(server):
    server.memory.add(1, add(server.messages("train", 1), server.size, 32))
    packed, facts = next(server.memory.messages(2, 1, {"round": 1}))
    standings = [blind.stand(client, facts, packed) for client in server.clients]
    assert all(torch.equal(s.transcript, standings[0].transcript) and s.members.tolist() == list(ALL) for s in standings)
    again = blind.stand(server.clients[2], {**facts, "since": 1}, pack({}, octets()))
    assert torch.equal(again.transcript, standings[2].transcript) and np.array_equal(again.told, standings[2].told)
