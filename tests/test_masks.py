"""Blind aggregation: the sum opens to the mean, the server sees noise, and whatever was tampered with does not open."""

from __future__ import annotations

import numpy as np
import pytest

from fl.keys import SharedKey
from fl.wire import masks
from fl.wire.flat import WireError
from fl.wire.masks import SealError, Terms, encoded, open_total, seal
from fl.wire.sealed import NONCE, Sealed, add, join, size, split

KEY, OTHER = SharedKey(bytes(range(32))), SharedKey(bytes(32))
COUNT = 1001
TERMS = {bits: Terms(bits=bits, most=8, largest=100, clip=1.0) for bits in (12, 16, 32)}
IMAGES = (100, 1, 37, 50)


def update(seed: int, size_: float = 0.2) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(0, size_, COUNT), -1, 1).astype(np.float32)


def messages(bits: int = 32, run: str = "run", round: int = 3) -> list[Sealed]:
    return [seal(KEY, run, round, k, update(k), n, 0.5 + k, TERMS[bits]) for k, n in enumerate(IMAGES)]


def total(sent, bits: int = 32):
    return add(sent, COUNT, bits)


@pytest.mark.parametrize("bits", TERMS)
def test_the_sum_opens_to_the_fixed_point_mean_bit_for_bit(bits):
    opened = open_total(KEY, "run", 3, total(messages(bits), bits), COUNT, TERMS[bits])
    x = sum(encoded(update(k), n, TERMS[bits])[0].astype(np.int64) for k, n in enumerate(IMAGES))[:COUNT]
    expected = (x * (TERMS[bits].step * 100 / sum(IMAGES))).astype(np.float32)
    assert opened.mean.tobytes() == expected.tobytes()
    assert (opened.images, opened.clipped) == (sum(IMAGES), 0)
    assert opened.loss == pytest.approx(sum(n * (0.5 + k) for k, n in enumerate(IMAGES)) / sum(IMAGES), rel=1e-6)


def test_thirty_two_bits_are_the_float_mean_to_a_millionth():
    opened = open_total(KEY, "run", 3, total(messages()), COUNT, TERMS[32])
    exact = sum(n * update(k).astype(np.float64) for k, n in enumerate(IMAGES)) / sum(IMAGES)
    assert np.linalg.norm(opened.mean - exact) / np.linalg.norm(exact) < 1e-6


@pytest.mark.parametrize("gone", [(), (0,), (1, 3), (0, 1, 2)])
def test_whoever_stays_away_costs_nothing(gone):
    left = [k for k in range(len(IMAGES)) if k not in gone]
    opened = open_total(KEY, "run", 3, total([messages()[k] for k in left]), COUNT, TERMS[32])
    exact = sum(IMAGES[k] * update(k).astype(np.float64) for k in left) / sum(IMAGES[k] for k in left)
    np.testing.assert_allclose(opened.mean, exact, atol=1e-6)


def test_the_order_of_arrival_is_of_no_matter():
    sent = messages()
    one, other = total(sent), total(sent[::-1])
    assert one.members == other.members and one.payload.tobytes() == other.payload.tobytes()


@pytest.mark.parametrize("bits", TERMS)
def test_the_largest_sum_does_not_overflow(bits):
    terms = TERMS[bits]
    for sign in (1, -1):
        full = np.full(COUNT, sign * 9.0, np.float32)
        sent = [seal(KEY, "run", 1, k, full, 100, 0, terms) for k in range(terms.most)]
        opened = open_total(KEY, "run", 1, total(sent, bits), COUNT, terms)
        np.testing.assert_allclose(opened.mean, sign * terms.clip, rtol=1e-6)
        assert opened.clipped == COUNT * terms.most


def test_two_sealings_of_one_update_share_nothing_even_with_a_frozen_random_source(monkeypatch):
    seals = [seal(KEY, "run", 1, 0, update(0), 10, 0, TERMS[32]) for _ in range(2)]
    assert seals[0].nonce != seals[1].nonce and np.mean(seals[0].payload == seals[1].payload) < 0.01
    monkeypatch.setattr(masks.secrets, "token_bytes", bytes)
    frozen = [seal(KEY, "run", 1, 0, update(k), 10, 0, TERMS[32]) for k in range(2)]
    assert frozen[0].nonce != frozen[1].nonce and np.mean(frozen[0].payload == frozen[1].payload) < 0.01
    other = [seal(KEY, "run", 1, 0, update(0), 10, loss, TERMS[32]) for loss in (0.5, 1.0)]
    assert other[0].nonce != other[1].nonce and np.mean(other[0].payload == other[1].payload) < 0.01


@pytest.mark.parametrize("bits", TERMS)
def test_what_the_server_holds_is_uniform(bits):
    zeros = [seal(KEY, "run", 1, k, np.zeros(40_000, np.float32), 10, 0, TERMS[bits]) for k in range(3)]
    for payload in (zeros[0].payload, add(zeros, 40_000, bits).payload):
        counts = np.bincount(payload, minlength=256)
        chi2 = float(((counts - payload.size / 256) ** 2 / (payload.size / 256)).sum())
        assert 160 < chi2 < 370  # 255 degrees of freedom: five standard deviations
    assert abs(np.corrcoef(zeros[0].payload[:-64], zeros[1].payload[:-64])[0, 1]) < 0.03


def changed(sealed: Sealed, at: int = 7) -> Sealed:
    payload = sealed.payload.copy()
    payload[at] ^= 1
    return sealed._replace(payload=payload)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sent: [changed(sent[0]), *sent[1:]],
        lambda sent: [changed(sent[0], -1), *sent[1:]],
        lambda sent: [sent[0]._replace(client=7), *sent[1:]],
        lambda sent: [sent[0]._replace(nonce=bytes(NONCE)), *sent[1:]],
        lambda sent: [messages(round=2)[0], *sent[1:]],
        lambda sent: [messages(run="another")[0], *sent[1:]],
        lambda sent: [seal(OTHER, "run", 3, 0, update(0), 100, 0, TERMS[32]), *sent[1:]],
    ],
    ids=["a bit", "a bit of the tag", "another client", "another nonce", "another round", "another run", "another key"],
)
def test_what_was_tampered_with_does_not_open(spoil):
    with pytest.raises(SealError, match="the sum of round 3 does not carry the tag"):
        open_total(KEY, "run", 3, total(spoil(messages())), COUNT, TERMS[32])


def test_a_list_that_is_not_the_sums_does_not_open():
    whole = total(messages())
    for wrong in (whole.members[1:], (*whole.members, (7, bytes(NONCE)))):
        with pytest.raises(SealError, match="tag"):
            open_total(KEY, "run", 3, whole._replace(members=wrong), COUNT, TERMS[32])
    with pytest.raises(SealError, match="different clients"):
        open_total(KEY, "run", 3, whole._replace(members=whole.members[:1] * 2), COUNT, TERMS[32])


def test_the_server_refuses_what_it_can_see():
    sent = messages()
    with pytest.raises(WireError, match="client 0 must be in a sum once"):
        total([*sent, sent[0]])
    with pytest.raises(WireError, match="client 1: a sealed message must have"):
        total([sent[0], sent[1]._replace(payload=sent[1].payload[:-1])])
    with pytest.raises(WireError, match="got none"):
        total([])


def test_a_client_says_what_it_cannot_seal():
    with pytest.raises(SealError, match="made of images to be sealed, and this client has none"):
        seal(KEY, "run", 1, 0, update(0), 0, 0, TERMS[32])
    with pytest.raises(SealError, match="finite"):
        seal(KEY, "run", 1, 0, np.array([np.nan], np.float32), 1, 0, TERMS[32])
    for loss in (float("nan"), float("inf"), -1.0):
        with pytest.raises(SealError, match="a loss must be finite and not negative"):
            seal(KEY, "run", 1, 0, update(0), 1, loss, TERMS[32])


@pytest.mark.parametrize("bits", TERMS)
def test_words_are_packed_and_unpacked(bits):
    words, tail = np.arange(COUNT + 1, dtype=np.uint32) * 4_000_037 & np.uint32(2**bits - 1), np.arange(4, dtype=np.uint64) + 2**63
    payload = join(words, tail, bits)
    assert payload.size == size(COUNT, bits)
    back, last = split(payload, bits)
    assert back.tolist() == words.tolist() and last.tolist() == tail.tolist()


def test_rounding_by_chance_is_right_on_the_average():
    terms, one = TERMS[12], np.full(4000, 0.4 * TERMS[12].step, np.float32)
    x, _ = encoded(one, 100, terms, np.random.default_rng(0))
    assert set(x.tolist()) == {0, 1} and x.mean() == pytest.approx(0.4, abs=0.04)
