"""Blind aggregation: the clients' shared key hides every update, and their sum, from the server that adds them.

    step = clip / L        L = floor((2^(b-1) - 1) / most)                    no sum of ``most`` messages can overflow
    x = round(w u / step), clipped to [-L, L]        w = images / largest     u: the update, float32 (n,)
    c = (x, images, clipped, loss, tag) + AES-256-CTR(HMAC(K_mask, bound | round | client | nonce))    the tag mod p,
    tag = <alpha, (x, images, clipped, loss)> mod p    p = 2^61 - 1           x mod 2^b, the other three mod 2^64

The server adds what came and says who is in it; a client takes the listed masks off, checks the tag, which adds up as the
messages do, and divides: sum x step largest / sum images. Whoever stays away is not in the list, and nothing is to be done.
``bound`` says what all of them stand on (`fl.wire.transcript`): what stands on anything else does not open.

alpha are secret words, new for each bound and round. In a field a message that was changed keeps its tag with probability
1/p whatever was added to it, so a refusal tells nothing of alpha; modulo 2^64 the sum's parities would. Two numbers that
differ by p would pass, too; so the sum must lie in its range, where all numbers are below p, or it is refused alike.

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

from fl.seal_key import SealKey
from fl.wire.sealed import NONCE, PRIME, ROOM, TAIL, Bits, Sealed, Total, join, size, split

LOSS = 2**16   # fixed point of the loss
WORST = 2**13  # a mean loss, at most: what is worse is told as this much; ROOM x WORST x LOSS < p
BLOCK = 2**15  # words of a product at once, which a core's cache holds


class SealError(ValueError):
    """A sum that must not be believed; the message says what does not fit."""


class Terms(NamedTuple):
    """What all clients agree on before the first round.

    Words of ``bits`` bits; ``least`` to ``most`` messages in a sum; no client weighs more than ``largest`` images; values of
    a weighted update beyond ``clip`` are cut, and counted.
    """

    bits: Bits = 32
    most: int = 10
    largest: int = 10_000
    clip: float = 1.0
    least: int = 1

    @property
    def limit(self) -> int:
        """L, the largest integer that a message may hold."""
        return (2 ** (self.bits - 1) - 1) // self.most

    @property
    def step(self) -> float:
        """What one unit of an integer stands for."""
        return self.clip / self.limit

    def weight(self, images: int) -> int:
        """The images that a client of so many is counted with: who has more than ``largest`` weighs as one of ``largest``."""
        return min(images, self.largest)


class Opened(NamedTuple):
    """A sum that was opened: the mean update, float32 (n,), and of all clients together images, clipped values, mean loss."""

    mean: np.ndarray
    images: int
    clipped: int
    loss: float


def seal(
    key: SealKey, bound: str, round: int, client: int, update: np.ndarray, images: int, loss: float, terms: Terms,
    chance: np.random.Generator | None = None,
) -> Sealed:
    """Encode and mask ``update`` (float32 (n,)), made of so many ``images`` with this ``loss``.

    With ``chance`` values are rounded by chance, right on the average, which a narrow form needs. Raises SealError for values
    that are not finite.
    """
    if not 0 <= loss < np.inf:
        raise SealError("a loss must be finite and not negative to be sealed, and this one is not; lower the learning rate")
    x, clipped = encoded(update, images, terms, chance)
    counted = terms.weight(images)
    tail = np.array([counted, clipped, int(min(loss, WORST) * counted * LOSS), 0], np.uint64)
    tail[3] = _tag(key, bound, round, x, tail)
    nonce = _nonce(key, bound, round, client, x, tail, secrets.token_bytes(NONCE))
    mask, last = _mask(key, bound, round, client, nonce, x.size, terms.bits)
    return Sealed(client, nonce, join(x.view(np.uint32) + mask, _added(tail, last), terms.bits))


def encoded(update: np.ndarray, images: int, terms: Terms, chance: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
    """The integers x, int32 (n,) with n made even, and how many values were clipped. Raises SealError as `seal` does."""
    _fit(terms)
    if images < 1:
        raise SealError("an update must be made of images to be sealed, and this client has none")
    scaled = update.astype(np.float64) * (terms.weight(images) / terms.largest / terms.step)
    if not np.isfinite(scaled).all():
        raise SealError("an update must be finite to be sealed, got nan or inf; lower the learning rate")
    rounded = np.floor(scaled + (0.5 if chance is None else chance.random(scaled.size)))
    clipped = int(np.count_nonzero(np.abs(rounded) > terms.limit))
    x = np.zeros(update.size + update.size % 2, np.int32)
    x[: update.size] = np.clip(rounded, -terms.limit, terms.limit)
    return x, clipped


def open_total(key: SealKey, bound: str, round: int, total: Total, count: int, terms: Terms) -> Opened:
    """Take the masks of ``total.members`` off, check range and tag, and divide. ``count``: values of an update.

    Raises SealError for a list that cannot be, of too few, too many or one twice; and with one and the same line for all
    that depends on the key: a message was changed, lost, or sealed on another run, config, round or history, or the list is
    not that of the sum.
    """
    clients = [client for client, _ in total.members]
    _fit(terms)
    if not max(1, terms.least) <= len(clients) <= terms.most or len(set(clients)) != len(clients):
        raise SealError(f"a sum must be of {max(1, terms.least)} to {terms.most} different clients, got {clients}")
    if total.payload.shape != (size(count, terms.bits),):
        raise _closed(round, clients)
    words, tail = split(total.payload, terms.bits)
    for client, nonce in total.members:
        mask, last = _mask(key, bound, round, client, nonce, words.size, terms.bits)
        words, tail = words - mask, _added(tail, last, -1)
    x = signed(words, terms.bits)
    images, clipped, loss, tag = (int(word) for word in tail)
    most = len(clients) * terms.largest
    fits = tag == _tag(key, bound, round, x, tail)
    if not (fits and 0 < images <= most and clipped <= len(clients) * x.size and loss <= images * WORST * LOSS):
        raise _closed(round, clients)
    mean = (x[:count] * (terms.step * terms.largest / images)).astype(np.float32)
    return Opened(mean, images, clipped, loss / LOSS / images)


def signed(words: np.ndarray, bits: Bits) -> np.ndarray:
    """uint32 modulo 2^bits -> the int32 nearest to zero that it stands for."""
    shift = 32 - bits
    return (words << np.uint32(shift)).view(np.int32) >> shift


def product(alpha: np.ndarray, x: np.ndarray) -> int:
    """<alpha, x> mod p, exactly. ``alpha``: uint64 (n,), ``x``: int32 (n,), n < 2^31.

    Each alpha is two halves of 32 bits, whose products with x fit into 63 bits; these are added by their own halves.
    """
    halves, found = alpha.view("<u4").reshape(-1, 2), 0
    for at in range(0, x.size, BLOCK):
        values = x[at : at + BLOCK].astype(np.int64)
        for half, shift in ((0, 0), (1, 32)):
            terms = halves[at : at + BLOCK, half] * values
            found += ((int((terms >> 32).sum()) << 32) + int((terms & 0xFFFFFFFF).sum())) << shift
    return found % PRIME


def _fit(terms: Terms) -> None:
    """The bound under which no number of a sum's tail reaches p, whoever chose the config."""
    if terms.most * terms.largest > ROOM:
        raise SealError(f"a sum may be of {ROOM} images, got {terms.most} clients of up to {terms.largest}; lower seal.largest")


def _closed(round: int, clients: Sequence[int]) -> SealError:
    return SealError(f"the sum of round {round} does not carry the tag of its list {clients}: changed, cut short or replayed")


def _added(tail: np.ndarray, mask: np.ndarray, sign: int = 1) -> np.ndarray:
    """The tail with its mask put on, or with ``sign`` -1 taken off: the tag modulo p, the others modulo 2^64."""
    moved = tail + mask if sign > 0 else tail - mask
    moved[-1] = (int(tail[-1]) + sign * int(mask[-1])) % PRIME
    return moved


def _tag(key: SealKey, bound: str, round: int, x: np.ndarray, tail: np.ndarray) -> int:
    # words of 64 bits modulo p: of p residues nine come 9 times where the others come 8 times in 2^64
    alpha = np.frombuffer(key.stream(f"blind tag {bound} {round}", 8 * (x.size + TAIL - 1)), "<u8")
    return (product(alpha[: x.size], x) + sum(int(a) * int(v) for a, v in zip(alpha[x.size :], tail))) % PRIME


def _nonce(key: SealKey, bound: str, round: int, client: int, x: np.ndarray, tail: np.ndarray, fresh: bytes) -> bytes:
    state = hmac.new(key.stream("blind nonce", 32), fresh, "sha256")
    state.update(f"{bound}|{round}|{client}|".encode())
    state.update(x.data)
    state.update(tail.data)
    return state.digest()[:NONCE]


def _mask(key: SealKey, bound: str, round: int, client: int, nonce: bytes, count: int, bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    own = hmac.digest(key.stream("blind mask", 32), f"{bound}|{round}|{client}|".encode() + nonce, "sha256")
    words = Cipher(algorithms.AES(own), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count + 8 * TAIL))
    return np.frombuffer(words, "<u4", count), np.frombuffer(words, "<u8", TAIL, 4 * count)
