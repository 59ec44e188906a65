"""Blind aggregation: the clients' shared key hides every update, and their sum, from the server that adds them.

    step = clip / L        L = floor((2^(b-1) - 1) / most)                    no sum of ``most`` messages can overflow
    x = round(w u / step), clipped to [-L, L]        w = images / largest     u: the update, float32 (n,)
    c = (x, images, clipped, loss, tag) + AES-256-CTR(HMAC(K_mask, run | round | client | nonce))    mod 2^b, mod 2^64
    tag = <alpha, (x, images, clipped, loss)> mod 2^64        alpha: the round's secret words

The server adds what came and says who is in it; a client takes the listed masks off, checks the tag, which adds up as the
messages do, and divides: sum x step largest / sum images. Whoever stays away is not in the list, and nothing is to be done.
The scheme is FLASHE's (Jiang et al., arXiv 2109.00675), after Castelluccia et al. 2005; the tag is linear as in
homomorphic MACs. A mask must never be used twice, and that rests on no number that the server gives: the nonce is an HMAC
over fresh random bytes and the encoded update itself, so that neither a frozen random source nor a cloned machine can mask
two different updates alike. One colluding client or a stolen key opens everything.
"""

from __future__ import annotations

import hmac
import secrets
from typing import NamedTuple, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fl.keys import SharedKey
from fl.wire.sealed import NONCE, TAIL, Bits, Sealed, Total, join, split

LOSS = 2**20  # fixed point of the loss


class SealError(ValueError):
    """A sum that must not be believed; the message says what does not fit."""


class Terms(NamedTuple):
    """What all clients agree on before the first round.

    Words of ``bits`` bits; at most ``most`` messages in a sum; no client has more than ``largest`` images; values of a
    weighted update beyond ``clip`` are cut, and counted.
    """

    bits: Bits = 32
    most: int = 10
    largest: int = 10_000
    clip: float = 1.0

    @property
    def limit(self) -> int:
        """L, the largest integer that a message may hold."""
        return (2 ** (self.bits - 1) - 1) // self.most

    @property
    def step(self) -> float:
        """What one unit of an integer stands for."""
        return self.clip / self.limit


class Opened(NamedTuple):
    """A sum that was opened: the mean update, float32 (n,), and of all clients together images, clipped values, mean loss."""

    mean: np.ndarray
    images: int
    clipped: int
    loss: float


def seal(
    key: SharedKey, run: str, round: int, client: int, update: np.ndarray, images: int, loss: float, terms: Terms,
    chance: np.random.Generator | None = None,
) -> Sealed:
    """Encode and mask ``update`` (float32 (n,)), made of so many ``images`` with this ``loss``.

    With ``chance`` values are rounded by chance, right on the average, which a narrow form needs. Raises SealError for values
    that are not finite and for more images than agreed.
    """
    if not 0 <= loss < 2**20:
        raise SealError(f"a loss must be finite and not negative to be sealed, got {loss}; lower the learning rate")
    x, clipped = encoded(update, images, terms, chance)
    tail = np.array([images, clipped, int(loss * images * LOSS), 0], np.uint64)
    tail[3] = _tag(key, run, round, x, tail)
    nonce = _nonce(key, run, round, client, x, tail, secrets.token_bytes(NONCE))
    mask, last = _mask(key, run, round, client, nonce, x.size, terms.bits)
    return Sealed(client, nonce, join(x.view(np.uint32) + mask, tail + last, terms.bits))


def encoded(update: np.ndarray, images: int, terms: Terms, chance: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
    """The integers x, int32 (n,) with n made even, and how many values were clipped. Raises SealError as `seal` does."""
    if not 0 < images <= terms.largest:
        raise SealError(f"a client may have 1 to {terms.largest} images, and this one has not; raise seal.largest for all clients")
    scaled = update.astype(np.float64) * (images / terms.largest / terms.step)
    if not np.isfinite(scaled).all():
        raise SealError("an update must be finite to be sealed, got nan or inf; lower the learning rate")
    rounded = np.floor(scaled + (0.5 if chance is None else chance.random(scaled.size)))
    clipped = int(np.count_nonzero(np.abs(rounded) > terms.limit))
    x = np.zeros(update.size + update.size % 2, np.int32)
    x[: update.size] = np.clip(rounded, -terms.limit, terms.limit)
    return x, clipped


def open_total(key: SharedKey, run: str, round: int, total: Total, count: int, terms: Terms) -> Opened:
    """Take the masks of ``total.members`` off, check the tag, and divide. ``count``: values of an update.

    Raises SealError for too many members, one that is listed twice, and a tag that does not fit: a message was changed, lost,
    replayed from another round, or the list is not that of the sum.
    """
    clients = [client for client, _ in total.members]
    if not 0 < len(clients) <= terms.most or len(set(clients)) != len(clients):
        raise SealError(f"a sum must be of 1 to {terms.most} different clients, got {clients}")
    words, tail = split(total.payload, terms.bits)
    for client, nonce in total.members:
        mask, last = _mask(key, run, round, client, nonce, words.size, terms.bits)
        words, tail = words - mask, tail - last
    x = signed(words, terms.bits)
    if tail[3] != _tag(key, run, round, x, tail):
        raise SealError(f"the sum of round {round} does not carry the tag of its list {clients}: changed, cut short or replayed")
    images, clipped, loss = (int(word) for word in tail[:3])
    mean = (x[:count] * (terms.step * terms.largest / images)).astype(np.float32)
    return Opened(mean, images, clipped, loss / LOSS / images)


def signed(words: np.ndarray, bits: Bits) -> np.ndarray:
    """uint32 modulo 2^bits -> the int32 nearest to zero that it stands for."""
    shift = 32 - bits
    return (words << np.uint32(shift)).view(np.int32) >> shift


def _tag(key: SharedKey, run: str, round: int, x: np.ndarray, tail: np.ndarray) -> np.uint64:
    alpha = np.frombuffer(key.stream(f"blind tag {run} {round}", 8 * (x.size + TAIL - 1)), "<u8")
    values = np.concatenate([x.astype(np.int64).view(np.uint64), tail[:3]])
    return (alpha * values).sum(dtype=np.uint64)


def _nonce(key: SharedKey, run: str, round: int, client: int, x: np.ndarray, tail: np.ndarray, fresh: bytes) -> bytes:
    state = hmac.new(key.stream("blind nonce", 32), fresh, "sha256")
    state.update(f"{run}|{round}|{client}|".encode())
    state.update(x.data)
    state.update(tail.data)
    return state.digest()[:NONCE]


def _mask(key: SharedKey, run: str, round: int, client: int, nonce: bytes, count: int, bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    own = hmac.digest(key.stream("blind mask", 32), f"{run}|{round}|{client}|".encode() + nonce, "sha256")
    words = Cipher(algorithms.AES(own), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count + 8 * TAIL))
    return np.frombuffer(words, "<u4", count), np.frombuffer(words, "<u8", TAIL, 4 * count)
