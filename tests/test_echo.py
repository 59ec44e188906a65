"""A server that shows clients different histories of one run is named; so is a message that is not the client's whose it says it is."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import first
from test_simulation import by_loop, equal, home, settings  # noqa: F401

from clients import blind as client_side
from clients import local
from clients.echo import VIEWS
from clients.notes import Notes
from fl.config import load
from fl.keys import SharedKey
from fl.wire import sealed
from fl.wire.echo import echo, echoes
from fl.wire.flat import Packed, pack, unpack
from fl.wire.masks import SealError
from fl.wire.octets import octets
from fl.wire.sealed import ECHO, Sealed, Total
from simulations.verify import verify
from strategies.report import report, trusted
from strategies.talk import Answer

KEY, NONCE = SharedKey(bytes(range(32))), bytes(16)
SECURE = "blind=true seal.largest=200"
OCTETS = octets()


# The echo itself ------------------------------------------------------------------------------------------------------


def test_an_echo_says_whether_another_stands_here_and_of_any_other_message_nothing():
    heard = echo(KEY, "run", "train ab", 3, 1, NONCE)
    assert len(heard) == ECHO and echoes(KEY, "run", "train ab", 3, 1, NONCE, heard) is True
    assert echoes(KEY, "run", "train cd", 3, 1, NONCE, heard) is False and echoes(KEY, "run", "evaluate ab", 3, 1, NONCE, heard) is False
    flipped = bytes([heard[0] ^ 1]) + heard[1:]
    for other in (
        (SharedKey(bytes(32)), "run", "train ab", 3, 1, NONCE, heard), (KEY, "ran", "train ab", 3, 1, NONCE, heard),
        (KEY, "run", "train ab", 4, 1, NONCE, heard), (KEY, "run", "train ab", 3, 2, NONCE, heard), (KEY, "run", "train ab", 3, 1, b"\1" * 16, heard),
        (KEY, "run", "train ab", 3, 1, NONCE, flipped), (KEY, "run", "train ab", 3, 1, NONCE, heard[:-1]), (KEY, "run", "train ab", 3, 1, NONCE, b""),
        (KEY, "run", "train ab", 3, 1, NONCE, bytes(ECHO)),
    ):
        assert echoes(*other) is None


@pytest.mark.parametrize("at", range(ECHO))
def test_no_bit_of_an_echo_can_be_changed(at):
    heard = bytearray(echo(KEY, "run", "train ab", 3, 1, NONCE))
    for bit in range(8):
        heard[at] ^= 1 << bit
        assert echoes(KEY, "run", "train ab", 3, 1, NONCE, bytes(heard)) is None
        heard[at] ^= 1 << bit


def test_echoes_tell_a_server_nothing_of_who_stands_together():
    """Those of two who stand alike are as different as any, and all are uniform bytes."""
    two = [echo(KEY, "run", "train ab", 1, client, NONCE) for client in range(2)]
    assert two[0] != two[1]
    octet = np.frombuffer(b"".join(echo(KEY, "run", "train ab", r, 0, NONCE) for r in range(4000)), np.uint8)
    counts = np.bincount(octet, minlength=256)
    assert 130 < float(((counts - octet.size / 256) ** 2 / (octet.size / 256)).sum()) < 400  # 255 degrees of freedom, sd 22.6


def test_a_total_keeps_its_echoes_in_the_order_of_its_members():
    messages = [Sealed(c, bytes([c]) * 16, np.zeros(sealed.size(2, 32), np.uint8), bytes([c]) * 32) for c in (2, 0, 1)]
    total = sealed.add(messages, 2, 32)
    back = sealed.total_of("x", sealed.named("x", total))
    assert back.members == total.members and back.echoes == total.echoes == tuple(bytes([c]) * 32 for c in range(3))
    assert sealed.listed(back) == b"".join(bytes([c, 0, 0, 0]) + bytes([c]) * 16 for c in range(3))  # what a transcript holds has no echo


# A server that lies ---------------------------------------------------------------------------------------------------


class Server:
    """A server that shows whom it likes what it likes, over the protocol of the plain loop; it has no key."""

    def __init__(self, home, out, clients: int = 4, *more: str) -> None:
        words = settings(home, out, f"clients={clients}", SECURE, "rounds=5 quorum=0.6 data.train=80", *more)
        self.config = load(words)
        self.clients = [local.open_client(self.config, i, clients) for i in range(clients)]

    def facts(self, round: int, since: int, upto: int, **more) -> dict:
        return {"run": "run", "round": round, "since": since, "upto": upto, "config": self.config.digest(), **more}

    def train(self, i: int, round: int, sums: dict[int, Total], state: torch.Tensor | None = None) -> Sealed:
        """The message of client i in ``round``, which is sent these sums on top of where it stands, or of a locked ``state``."""
        since = round - 1 - len(sums)
        return message(i, client_side.train(self.clients[i], self.facts(round, since, round - 1), packed(sums, state))[1])

    def report(self, i: int, round: int, sums: dict[int, Total], **more) -> tuple[dict, Packed | None]:
        return client_side.report(self.clients[i], self.facts(round, round - len(sums), round, **more), packed(sums))

    def add(self, *messages: Sealed) -> Total:
        recipe, given = client_side.ask(self.clients[0], self.facts(1, 0, 0), pack({}, OCTETS))[1:]
        return sealed.add(messages, sum(t.numel() for t in recipe.sent(given).values()), 32)

    def stopped(self) -> list[str]:
        return [Notes(client.drawer("run")).stopped for client in self.clients]


def packed(sums: dict[int, Total], state: torch.Tensor | None = None) -> Packed:
    tensors = {n: t for r, total in sums.items() for n, t in sealed.named(f"{r:05}", total).items()}
    return pack({**tensors, **({} if state is None else {"sealed.state": state})}, OCTETS)


def message(i: int, sent: Packed) -> Sealed:
    came = unpack(sent, OCTETS)
    return Sealed(i, came["sealed.nonce"].numpy().tobytes(), came["sealed.payload"].numpy(), came["sealed.echo"].numpy().tobytes())


def subsets(server: Server, chance: random.Random) -> Total:
    """Two sums of round 1, of three clients each; half the clients are shown one, half the other."""
    messages = [server.train(i, 1, {}) for i in range(4)]
    out = chance.sample(range(4), 2)
    views = [server.add(*(m for m in messages if m.client != o)) for o in out]
    group = set(chance.sample(range(4), chance.choice([1, 2, 3])))
    return server.add(*(server.train(i, 2, {1: views[i in group]}) for i in range(4)))


def mixed_state(server: Server, chance: random.Random) -> Total:
    """A client that stands on one sum locks its state; another, which would stand on the other sum, is given that."""
    messages = [server.train(i, 1, {}) for i in range(4)]
    one, other = (server.add(*(m for m in messages if m.client != o)) for o in chance.sample(range(4), 2))
    witness, victim = chance.sample(range(4), 2)
    state = unpack(server.report(witness, 1, {1: one}, state=True)[1], OCTETS)["sealed.state"]
    return server.add(*(server.train(i, 2, *(({}, state) if i == victim else ({1: other},))) for i in range(4)))


def repeated(server: Server, chance: random.Random) -> Total:
    """Round 1 is asked for twice; some take the first sum, some the second of the same clients."""
    first_, second = (server.add(*(server.train(i, 1, {}) for i in range(4))) for _ in range(2))
    group = set(chance.sample(range(4), 2))
    return server.add(*(server.train(i, 2, {1: first_ if i in group else second}) for i in range(4)))


@pytest.mark.parametrize("attempt", first(2, list(range(20))))
@pytest.mark.parametrize("lie", [subsets, mixed_state, repeated])
def test_a_server_that_shows_two_views_is_named_in_the_round_that_follows(home, tmp_path, caplog, lie, attempt):
    server = Server(home, tmp_path)
    total = lie(server, random.Random(f"{lie.__name__} {attempt}"))
    said = [server.report(i, 2, {2: total})[0] for i in range(4)]
    assert said == 4 * [{"refused": VIEWS}] and server.stopped() == 4 * [VIEWS]
    assert sum(r.levelno == logging.ERROR and VIEWS in r.getMessage() for r in caplog.records) == 4
    for i in range(4):  # and they take no further part, whatever is shown to them now
        with pytest.raises(SealError, match=VIEWS):
            server.train(i, 1, {})
        with pytest.raises(SealError, match=VIEWS):
            client_side.evaluate(server.clients[i], server.facts(2, 1, 2), packed({2: total}))


def older(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """The sum of round 1 in the place of that of round 2."""
    return one


def renamed(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """One member's entry comes from another round."""
    i = chance.randrange(4)
    members, heard = list(two.members), list(two.echoes)
    members[i], heard[i] = one.members[i], one.echoes[i]
    return two._replace(members=tuple(members), echoes=tuple(heard))


def unheard(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """The echoes are left out."""
    return two._replace(echoes=4 * (bytes(ECHO),))


def swapped(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """Two members' echoes have changed places."""
    i, k = chance.sample(range(4), 2)
    heard = list(two.echoes)
    heard[i], heard[k] = heard[k], heard[i]
    return two._replace(echoes=tuple(heard))


def changed(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """A bit of the words, to which the echoes have nothing to say: the tag has."""
    payload = two.payload.copy()
    payload[chance.randrange(payload.size)] ^= 1 << chance.randrange(8)
    return two._replace(payload=payload)


def fewer(server: Server, chance: random.Random, one: Total, two: Total) -> Total:
    """A member is taken off the list, and not out of the sum."""
    i = chance.randrange(4)
    return two._replace(members=two.members[:i] + two.members[i + 1 :], echoes=two.echoes[:i] + two.echoes[i + 1 :])


@pytest.mark.parametrize("attempt", first(1, list(range(20))))
def test_an_older_or_an_altered_sum_is_refused_in_its_own_round(home, tmp_path, caplog, attempt):
    server, chance = Server(home, tmp_path), random.Random(attempt)
    one = server.add(*(server.train(i, 1, {}) for i in range(4)))
    two = server.add(*(server.train(i, 2, {1: one}) for i in range(4)))
    for i, lie in enumerate((older, renamed, unheard, swapped)):
        said = server.report(i, 2, {2: lie(server, chance, one, two)})[0]
        assert said["refused"].startswith("transcript: no message of client ") and logging.ERROR in {r.levelno for r in caplog.records[-2:]}
        named = {"older": 4, "renamed": 1, "unheard": 4, "swapped": 2}[lie.__name__]
        assert len(said["strangers"]) == named
    for i, lie in enumerate((changed, fewer)):
        said = server.report(i, 2, {2: lie(server, chance, one, two)})[0]
        assert set(said) == {"refused"} and "does not carry the tag" in said["refused"]
    assert server.stopped() == 4 * [""] and all("refused" not in server.report(i, 2, {2: two})[0] for i in range(4))  # the true one opens


def test_two_groups_that_are_never_mixed_have_not_half_the_clients_each(home, tmp_path):
    """What echoes cannot see: no message of one group comes to the other. Of more than half there are not enough clients for two."""
    server = Server(home, tmp_path, 6, "seal.members=3 quorum=0.1")
    messages = [server.train(i, 1, {}) for i in range(6)]
    for group in (range(3), range(3, 6)):
        assert "a sum must be of 4 to 6 different clients" in server.report(group[0], 1, {1: server.add(*(messages[i] for i in group))})[0]["refused"]
    assert "refused" not in server.report(0, 1, {1: server.add(*messages[:4])})[0]


def test_clients_that_are_led_back_and_forth_between_two_histories_name_the_server(home, tmp_path, caplog):
    """Two groups with clients in common, each with more than half of all: those in both see both, one after the other."""
    server = Server(home, tmp_path, 6)
    messages = [server.train(i, 1, {}) for i in range(6)]
    one, other = server.add(*messages[:4]), server.add(*messages[2:])
    two = server.add(*(server.train(i, 2, {1: one}) for i in range(4)))
    also = server.add(*(server.train(i, 2, {1: other}) for i in range(2, 6)))  # as if round 1 had been tried again: that may be
    said, state = server.report(0, 2, {2: two}, state=True)
    assert all("refused" not in s for s in (said, *(server.report(i, 2, {2: also})[0] for i in range(2, 6)))) and not any(server.stopped())
    for i, how in ((2, ({2: two}, None)), (3, ({}, unpack(state, OCTETS)["sealed.state"]))):  # by the sums, or with another's state
        with pytest.raises(SealError, match=VIEWS):
            if how[1] is None:
                client_side.train(server.clients[i], server.facts(3, 0, 2), packed({1: one, 2: two}))
            else:
                server.train(i, 3, *how)
    assert server.stopped() == ["", "", VIEWS, VIEWS, "", ""] and "leads this client back to a history that it has left" in caplog.text


def test_a_score_of_another_history_names_the_server_in_the_very_round(home, tmp_path):
    server = Server(home, tmp_path)
    messages = [server.train(i, 1, {}) for i in range(4)]
    views = [server.add(*(m for m in messages if m.client != o)) for o in (0, 3)]
    sent = [client_side.evaluate(server.clients[i], server.facts(1, 0, 1), packed({1: views[i % 2]}))[1] for i in range(4)]
    scores = sealed.add([message(i, s) for i, s in enumerate(sent)], 1, 32)
    facts = server.facts(1, 1, 1)
    said = client_side.report(server.clients[0], facts, pack(sealed.named("scores", scores), OCTETS))[0]
    assert said == {"refused": VIEWS} and server.stopped() == [VIEWS, "", "", ""]


# An honest server -----------------------------------------------------------------------------------------------------


def test_a_client_with_another_key_is_named_and_left_out(home, tmp_path, monkeypatch, capsys):
    """As a revoked node is: what it sends has echoes that nobody opens, and the round is tried again without it."""
    real, stranger = client_side.sounding, SharedKey(bytes(32))

    def sounding(client, run, bound, round, message):
        if client.index == 1 and bound.startswith("train") and round == 2:
            return message._replace(echo=echo(stranger, run, bound, round, client.index, message.nonce))
        return real(client, run, bound, round, message)

    monkeypatch.setattr(client_side, "sounding", sounding)
    summary, _ = by_loop(home, tmp_path, SECURE, "clients=4 rounds=3 quorum=0.6 retries=1")
    lines = [json.loads(line) for line in (tmp_path / "loop" / "record.jsonl").read_text().splitlines()]
    assert [[c for c, _ in line["sum"]["members"]] for line in lines if line["kind"] == "round"] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert ": transcript: no message of client 1" in capsys.readouterr().out and summary["rounds"] == 3


def test_a_stranger_that_is_asked_first_does_not_have_the_others_left_out():
    """It opens no echo but its own and names all others; they name it."""
    said = {0: [1, 2, 3], 1: [0], 2: [0], 3: [0]}
    accused = Counter()
    talk = report(2, [0, 1, 2, 3], lambda c: iter(()), refused := [], (), False, accused)
    question = next(talk)
    with pytest.raises(StopIteration) as end:
        while True:
            (client,) = question.messages
            question = talk.send([Answer(client, {"refused": "x", "strangers": said[client]})])
    assert end.value.value is None and len(refused) == 3
    assert trusted([0, 1, 2, 3], accused, 3) == [1, 2, 3] and trusted([0, 1, 2, 3], accused, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("named", [None, 3, "1", {"1": 1}, [[1]], [1.5], [True, None]])
def test_nonsense_in_the_place_of_names_accuses_nobody(named):
    accused = Counter()
    talk = report(2, [0, 2], lambda c: iter(()), [], (), False, accused)
    next(talk)
    talk.send([Answer(0, {"refused": "x", "strangers": named})])
    assert not accused


def test_a_run_that_is_resumed_names_nobody(home, tmp_path, monkeypatch):
    """The clients stood on a round that is done again: that is no other view, and the record says it."""
    words = "clients=3 rounds=4 checkpoint.every=2 checkpoint.last=1"
    steady = by_loop(home, tmp_path / "steady", SECURE, words)[1]
    real = client_side.ask

    def ask(client, facts, packed):
        if facts["round"] == 4 and client.index == 2:  # of round 3, which is over, there is no checkpoint
            raise Stop
        return real(client, facts, packed)

    with monkeypatch.context() as patch:
        patch.setattr(client_side, "ask", ask)
        with pytest.raises(Stop):
            by_loop(home, tmp_path, SECURE, words)
    assert equal(by_loop(home, tmp_path, SECURE, words, "resume=loop")[1], steady)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "loop" / "record.jsonl").read_text().splitlines()]
    assert kinds == ["begin", "round", "round", "round", "resumed", "round", "round", "end"]
    assert verify(tmp_path / "loop").rounds == 4


class Stop(Exception):
    """The end of the process."""


def test_a_sum_that_was_taken_and_dropped_names_nobody(home, tmp_path, monkeypatch, capsys):
    """All who report have opened the sum, but their answers are lost; the round is tried again, and they go back."""
    steady = by_loop(home, tmp_path / "steady", SECURE, "rounds=3")[1]
    real, lost = client_side.report, []

    def report(client, facts, packed):
        said = real(client, facts, packed)
        if facts["round"] == 2 and len(lost) < 3:
            lost.append(client.index)
            return {"train_loss": -1}, None
        return said

    monkeypatch.setattr(client_side, "report", report)
    assert equal(by_loop(home, tmp_path, SECURE, "rounds=3 retries=1")[1], steady)
    assert sorted(lost) == [0, 1, 2] and "tried again" in capsys.readouterr().out
    assert verify(tmp_path / "loop").ended
