"""The server as an attacker of what is sealed: what it adds, mixes, asks again or works out from told numbers gets it nothing."""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple

import numpy as np
import pytest
import torch

from clients import tell
from clients.notes import Notes
from clients.state import Drawer
from fl.config import load
from fl.keys import SharedKey
from fl.sections import Tell
from fl.wire import locked, masks, transcript
from fl.wire.masks import LOSS, WORST, Opened, SealError, Terms, encoded, open_total, product, seal
from fl.wire.sealed import PRIME, ROOM, TAIL, Total, add, join, split

KEY, OTHER = SharedKey(bytes(range(32))), SharedKey(bytes(32))
COUNT = 61
TERMS = Terms(bits=32, most=6, largest=400, clip=1.0, least=3)
SIZES = (183, 5, 2, 340, 3)


def total(key: SharedKey = KEY, bound: str = "train 00", round: int = 1, sizes: tuple[int, ...] = SIZES, terms: Terms = TERMS) -> Total:
    stream = np.random.default_rng(1)
    updates = [stream.normal(0, 0.2, COUNT).astype(np.float32) for _ in sizes]
    return add([seal(key, bound, round, k, updates[k], n, 0.5 + k, terms) for k, n in enumerate(sizes)], COUNT, terms.bits)


def opens(key: SharedKey, asked: Total, bound: str = "train 00", round: int = 1, terms: Terms = TERMS) -> Opened | str:
    """The sum, or what a client says instead."""
    try:
        return open_total(key, bound, round, asked, COUNT, terms)
    except SealError as error:
        return str(error)


# The tag --------------------------------------------------------------------------------------------------------------


def moved(asked: Total, at: int, by: int) -> Total:
    """``by`` added to the word ``at`` of the sum; from -TAIL on to one of its tail."""
    words, tail = split(asked.payload, 32)
    if at < 0:
        tail[at] = (int(tail[at]) + by) % 2**64
    else:
        words[at] = (int(words[at]) + by) % 2**32
    return asked._replace(payload=join(words, tail, 32))


def questions() -> Iterator[Callable[[Total], Total]]:
    """Sixty-four changes of a sum: of every word of the tail by what is special to 2^64, to p or to a range, and of words."""
    special = [1, 2, 2**31, 2**32, 2**60, 2**61, 2**62, 2**63, PRIME, -PRIME, 2 * PRIME, -1, PRIME - 1, 400, 2**63 + PRIME]
    yield from (lambda asked, at=at, by=by: moved(asked, at, by) for at in (-4, -3, -2) for by in special)
    yield from (lambda asked, at=at, by=by: moved(asked, at, by) for at in (0, 17) for by in (1, 2**30, 2**31, 2**32 - 1))
    yield from (lambda asked, by=by: moved(asked, -1, by) for by in (1, 2, -1, 2**60, 2**63))
    yield from (lambda asked, by=by: moved(moved(asked, -4, by), -1, by) for by in (1, 2**63, PRIME, 3, 5, 7))


def test_sixty_four_questions_to_a_tag_learn_nothing():
    """Each is refused, in the same words, whatever alpha is: the answers to two keys do not differ in one letter."""
    asked, keys = list(questions()), [SharedKey(bytes([k]) * 32) for k in range(12)]
    sums = {key: total(key) for key in keys}
    answers = [[opens(key, change(sums[key])) for change in asked] for key in keys]
    assert len(asked) == 64 and all(isinstance(opens(key, sums[key]), Opened) for key in keys)
    assert {answer for row in answers for answer in row} == {
        "the sum of round 1 does not carry the tag of its list [0, 1, 2, 3, 4]: changed, cut short or replayed"
    }


def test_a_number_that_is_p_too_large_carries_the_tag_and_is_out_of_its_range(monkeypatch):
    """The range is what refuses it: with no range it would open, to a step a billion times too small."""
    asked = moved(total(), -TAIL, PRIME)
    assert "does not carry the tag" in opens(KEY, asked)
    monkeypatch.setattr(masks, "ROOM", 2**80)
    wide = TERMS._replace(largest=2**62)
    found = [open_total(KEY, "train 00", 1, moved(total(terms=wide), -TAIL, by), COUNT, wide).images for by in (0, PRIME)]
    assert found == [sum(SIZES), sum(SIZES) + PRIME]


def test_the_tags_of_a_crowd_are_added_in_the_field():
    """Forty numbers below p are beyond 2^64 together."""
    crowd = TERMS._replace(most=40)
    assert opens(KEY, total(sizes=(7,) * 40, terms=crowd), terms=crowd).images == 280


def test_no_number_of_a_tail_can_reach_p():
    assert ROOM * WORST * LOSS < PRIME and ROOM * 2**20 < PRIME
    wide = Terms(most=ROOM, largest=2)
    for work in (lambda: encoded(np.zeros(2, np.float32), 1, wide), lambda: open_total(KEY, "a", 1, total(), COUNT, wide)):
        with pytest.raises(SealError, match=f"a sum may be of {ROOM} images, got {ROOM} clients of up to 2; lower seal.largest"):
            work()


def test_the_product_of_the_tag_is_exact_in_the_field():
    stream = np.random.default_rng(0)
    for size in (0, 1, 2, masks.BLOCK - 1, masks.BLOCK + 3):
        alpha = stream.integers(0, 2**64, size, np.uint64)
        x = stream.integers(-(2**31), 2**31, size).astype(np.int32)
        if size > 1:
            alpha[:2], x[:2] = 2**64 - 1, (-(2**31), 2**31 - 1)
        assert product(alpha, x) == sum(a * v for a, v in zip(alpha.tolist(), x.tolist())) % PRIME


def test_a_loss_beyond_all_measure_is_told_as_the_worst_there_is():
    sent = [seal(KEY, "a", 1, k, np.zeros(COUNT, np.float32), 10, 1.7e308, TERMS) for k in range(3)]
    assert open_total(KEY, "a", 1, add(sent, COUNT, 32), COUNT, TERMS).loss == WORST


def test_a_client_of_more_images_than_agreed_weighs_as_one_of_so_many():
    """No error, by which a server that halves seal.largest in each roll call would find the count."""
    sizes = (90_000, 400, 400)
    opened = opens(KEY, total(sizes=sizes))
    assert opened.images == 1200 and np.array_equal(opened.mean, opens(KEY, total(sizes=(400, 400, 400))).mean)


# The transcript -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(100,), (100, 200)])
def test_a_sum_of_fewer_than_agreed_does_not_open(sizes):
    assert opens(KEY, total(sizes=sizes)) == f"a sum must be of 3 to 6 different clients, got {list(range(len(sizes)))}"


class History(NamedTuple):
    run: str = "run"
    words: str = "blind=true"
    key: str = "aa"
    rounds: tuple[int, ...] = (1, 2)
    sizes: tuple[int, ...] = SIZES


def standing(history: History, sums: dict[tuple[int, tuple[int, ...]], Total]) -> bytes:
    at = transcript.begin(history.run, load(history.words), history.key)
    for round in history.rounds:
        at = transcript.follow(at, round, sums.setdefault((round, history.sizes), total(round=round, sizes=history.sizes)))
    return at


@pytest.mark.parametrize(
    "lie",
    [History(run="rum"), History(words="blind=true recipe.lr.head=1e-3"), History(words="blind=true seed=1"), History(key="ab"),
     History(rounds=(1,)), History(rounds=(2, 1)), History(rounds=()), History(sizes=SIZES[:3])],
    ids=["run", "config", "seed", "epoch", "older state", "order", "start", "subset"],
)  # fmt: skip
def test_a_message_from_another_run_config_epoch_state_or_history_does_not_open(lie):
    sums: dict = {}
    true, false = (transcript.bound(standing(history, sums), "train") for history in (History(), lie))
    honest = [seal(KEY, true, 3, k, np.zeros(COUNT, np.float32), 10, 0, TERMS) for k in range(3)]
    assert isinstance(opens(KEY, add(honest, COUNT, 32), true, 3), Opened)
    strange = seal(KEY, false, 3, 3, np.zeros(COUNT, np.float32), 10, 0, TERMS)
    assert "does not carry the tag" in opens(KEY, add([*honest, strange], COUNT, 32), true, 3)
    assert "does not carry the tag" in opens(KEY, add(honest, COUNT, 32), false, 3)
    assert "does not carry the tag" in opens(KEY, add(honest, COUNT, 32), true.replace("train", "evaluate"), 3)


def test_the_transcript_is_of_every_byte_of_what_was_followed_and_of_no_place():
    begun = transcript.begin("run", load("blind=true"), "aa")
    assert begun == transcript.begin("run", load("blind=true output=/elsewhere key=/other quorum=0.5"), "aa")
    sum_ = total()
    after = transcript.follow(begun, 1, sum_)
    assert len({begun, after}) == 2 and len(after) == transcript.BYTES
    flipped = sum_.payload.copy()
    flipped[-1] ^= 1
    others = [(1, sum_._replace(payload=flipped)), (2, sum_), (1, sum_._replace(members=sum_.members[1:])),
              (1, sum_._replace(members=((0, bytes(16)), *sum_.members[1:])))]  # fmt: skip
    assert after not in {transcript.follow(begun, round, other) for round, other in others}
    assert transcript.begin("ru", load("blind=true"), "naa") != transcript.begin("run", load("blind=true"), "aa")


# Locked states --------------------------------------------------------------------------------------------------------


def test_a_frozen_random_source_locks_two_states_under_two_keys_and_nonces(monkeypatch):
    monkeypatch.setattr(locked.secrets, "token_bytes", bytes)
    one, two = {"a": torch.zeros(64)}, {"a": torch.ones(64)}
    start = bytes(32)
    boxes = [locked.lock(KEY, start, 1, one), locked.lock(KEY, start, 1, two), locked.lock(KEY, start, 2, one), locked.lock(KEY, bytes(31) + b"\1", 1, one)]
    heads = {bytes(box[: locked.HEAD].tolist()) for box in boxes}
    assert len(heads) == len(boxes)
    plain = [np.frombuffer(locked.save(state), np.uint8) for state in (one, two)]
    streams = [box.numpy()[locked.HEAD : -16] ^ p for box, p in zip(boxes, plain)]
    assert np.mean(streams[0] == streams[1]) < 0.05  # a two-time pad would have them equal


def test_a_state_of_one_round_does_not_pass_as_that_of_another():
    box = locked.lock(KEY, bytes(32), 3, {"a": torch.zeros(4)})
    for start, round in ((bytes(32), 4), (bytes(32), 2), (bytes(31) + b"\1", 3)):
        with pytest.raises(SealError, match=f"the state of round {round} must be as a client locked it"):
            locked.unlock(KEY, start, round, box)


# What is told ---------------------------------------------------------------------------------------------------------


def candidates(told: float, exact: Callable[[int, int], float], unit: int, most: int) -> set[int]:
    """The counts n up to ``most`` for which a whole number k of ``1/unit`` makes ``exact(k, n)`` what was told."""
    near = ((n, round(told * n * unit)) for n in range(1, most + 1))
    return {n for n, k in near if any(exact(k + d, n) == told for d in (-1, 0, 1))}


def solved(rounds: list[tuple[tuple[int, ...], set[int]]], clients: int, most: int) -> list[set[int]]:
    """Each client's counts that are left: rounds of one list must agree, lists that differ by one client give its own, and all
    clients' together are the whole list's.
    """
    totals = {members: set.intersection(*(counts for other, counts in rounds if other == members)) for members, _ in rounds}
    found = [set(range(1, most + 1)) for _ in range(clients)]
    for one, counts in totals.items():
        for other, more in totals.items():
            if set(one) < set(other) and len(extra := set(other) - set(one)) == 1:
                found[extra.pop()] &= {m - n for n in counts for m in more}

    def together(some: list[set[int]]) -> set[int]:
        sums = {0}
        for counts in some:
            sums = {s + n for s in sums for n in counts if s + n <= most}
        return sums

    others = [together(found[:k] + found[k + 1 :]) for k in range(clients)]
    return [{n for n in found[k] if any(n + rest in totals[tuple(range(clients))] for rest in others[k])} for k in range(clients)]


def test_told_numbers_leave_hundreds_of_counts_where_exact_ones_left_one():
    """The honest server's arithmetic: a mean loss is k / (2^16 n), and two lists differ by a client's own count."""
    most, terms = sum(SIZES) + 60, TERMS._replace(least=2)
    lists, exact, told = [(0, 1, 2, 3, 4), *(tuple(j for j in range(5) if j != i) for i in range(5))], [], []
    for round, members in enumerate(3 * lists, 1):
        losses = np.random.default_rng(round).uniform(0.5, 3, 5)
        sent = [seal(KEY, "a", round, k, np.zeros(2, np.float32), SIZES[k], losses[k], terms) for k in members]
        opened = open_total(KEY, "a", round, add(sent, 2, 32), 2, terms)
        exact.append((members, candidates(opened.loss, lambda k, n: k / LOSS / n, LOSS, most)))
        loss = tell.trained(Tell(loss=2, accuracy=3), opened.loss)["train_loss"]
        told.append((members, candidates(loss, lambda k, n: round_(k / LOSS / n, 2), LOSS, most)))
    assert solved(exact, 5, most) == [{n} for n in SIZES]
    assert all(len(counts) >= 200 for counts in solved(told, 5, most))


def test_told_accuracies_leave_hundreds_of_counts_where_six_digits_left_few():
    """Over 20 rounds of one list of clients."""
    most, n = 1500, sum(SIZES)
    exact, told = set(range(1, most + 1)), set(range(1, most + 1))
    for right in np.random.default_rng(0).integers(n // 4, n, 20):
        share = float(np.float32(right / n))
        exact &= candidates(round_(share, 6), lambda k, m: round_(float(np.float32(k / m)), 6), 1, most)
        told &= candidates(tell.evaluated(Tell(loss=2, accuracy=3), share, 1.0, n)["accuracy"], lambda k, m: round_(k / m, 2), 1, most)
    assert exact <= {n, 2 * n} and len(told) >= 200


def round_(value: float, digits: int) -> float:
    return round(value, digits)


@pytest.mark.parametrize("loss, told", [(0.0, 0.0), (0.00123, 0.0), (0.6789, 0.68), (2.3456, 2.35), (15.4321, 15.4), (8191.98765, 8190.0)])
def test_a_large_loss_has_no_more_digits_than_a_small_one(loss, told):
    assert tell.trained(Tell(loss=2, accuracy=3), loss) == {"train_loss": told}
    assert tell.evaluated(Tell(loss=2, accuracy=3), 0.5, loss, 5000)["loss"] == told


@pytest.mark.parametrize("images, accuracy", [(999, 0.12), (1000, 0.123)])
def test_shares_of_few_images_are_coarser(images, accuracy):
    assert tell.evaluated(Tell(loss=2, accuracy=3), 0.12345, 1.23456, images) == {"accuracy": accuracy, "loss": 1.23}
    assert tell.evaluated(Tell(loss=0, accuracy=1), 0.12345, 1.23456, images) == {"accuracy": 0.1, "loss": 1.0}


def test_numbers_are_told_of_one_list_a_round_and_of_three_clients_at_least(tmp_path):
    notes = Notes(Drawer(str(tmp_path), "run", 0))
    assert not tell.may(notes, "train", 1, [0, 1], 2) and not tell.may(notes, "train", 1, [0, 1, 2], 4)
    assert tell.may(notes, "train", 1, [0, 1, 2, 3], 3) and not tell.may(notes, "train", 1, [0, 1, 2], 3)
    assert tell.may(notes, "evaluate", 1, [0, 1, 2], 3) and tell.may(notes, "train", 2, [0, 1, 2], 3)
    again = Notes(Drawer(str(tmp_path), "run", 0))  # after a restart, and after older rounds were cleared away
    again.drawer.keep("standing", 5, {}), again.drawer.tidy(9)
    assert tell.may(again, "train", 1, [0, 1, 2, 3], 3) and not tell.may(again, "train", 1, [0, 1, 2], 3)
