"""Sealed messages, as a blind server handles them: words that it can add and not read. It needs no key for that, and this file knows none.

    payload     n words of b bits, little-endian (12 bits: two words in three bytes), then four words of 64 bits
    adding      word by word, modulo 2^b; of the last four three modulo 2^64 and the tag modulo p = 2^61 - 1

A total carries the list of who is in it, each with the nonce of its mask: whoever holds the key takes exactly these masks off.
Beside it stands each one's echo, by which who takes the sum hears where that client stands (`fl.wire.echo`).
"""

from __future__ import annotations

from typing import Iterable, Literal, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fl.wire.flat import WireError

Bits = Literal[12, 16, 32]
NONCE = 16  # bytes
ECHO = 32   # bytes
ROW = 4 + NONCE + ECHO  # of one member in the list as it travels
TAIL = 4    # words of 64 bits: images, values that were clipped, loss, tag
PRIME = 2**61 - 1   # p, in whose field the tag is
ROOM = 2**31        # images in a sum, at most: with them no number of the tail reaches p (`fl.wire.masks`)


class Sealed(NamedTuple):
    """One client's masked message, uint8 (m,)."""

    client: int
    nonce: bytes
    payload: np.ndarray
    echo: bytes = bytes(ECHO)


class Total(NamedTuple):
    """A sum of masked messages and who is in it, in the order of clients; their echoes in the same order."""

    members: tuple[tuple[int, bytes], ...]
    payload: np.ndarray
    echoes: tuple[bytes, ...]


def size(count: int, bits: Bits) -> int:
    """Bytes of a payload of ``count`` words."""
    return -(-count // 2) * 2 * bits // 8 + 8 * TAIL


def add(messages: Iterable[Sealed], count: int, bits: Bits) -> Total:
    """The sum of messages of ``count`` words each, one at a time: memory for one, however many come.

    Raises WireError for none, for a client that is there twice, a nonce or a payload of another length: a total with a
    doubled or cut message would open to a wrong mean or to none.
    """
    members: dict[int, bytes] = {}
    echoes: dict[int, bytes] = {}
    total, tail, tag = np.zeros(count + count % 2, np.uint32), np.zeros(TAIL, np.uint64), 0
    for client, nonce, payload, echo in messages:
        if client in members:
            raise WireError(f"client {client} must be in a sum once, got it twice")
        if (len(nonce), len(echo)) != (NONCE, ECHO) or payload.dtype != np.uint8 or payload.shape != (size(count, bits),):
            says = f"a sealed message must have a nonce of {NONCE} bytes, an echo of {ECHO} and {size(count, bits)} bytes more"
            raise WireError(f"client {client}: {says}")
        words, last = split(payload, bits)
        total += words
        tail += last
        tag = (tag + int(last[-1])) % PRIME
        members[client], echoes[client] = bytes(nonce), bytes(echo)
    if not members:
        raise WireError("a sum needs messages, got none")
    tail[-1] = tag
    return Total(tuple(sorted(members.items())), join(total, tail, bits), tuple(echoes[client] for client in sorted(members)))


def listed(total: Total) -> bytes:
    """The list of its members: for each 4 bytes of its number, little-endian, and its nonce."""
    return b"".join(client.to_bytes(4, "little") + nonce for client, nonce in total.members)


def named(label: str, total: Total) -> dict[str, Tensor]:
    """``total`` as named tensors, for the wire: its payload; for each member uint8 (4 + NONCE,) of client and nonce, and its echo."""
    members = torch.frombuffer(bytearray(listed(total)), dtype=torch.uint8).reshape(-1, 4 + NONCE)
    echoes = torch.frombuffer(bytearray(b"".join(total.echoes)), dtype=torch.uint8).reshape(-1, ECHO)
    return {f"sealed.{label}.members": torch.cat([members, echoes], 1), f"sealed.{label}.payload": torch.from_numpy(total.payload)}


def total_of(label: str, tensors: Mapping[str, Tensor]) -> Total:
    """The total that `named` made into tensors. Raises WireError when there is none of that shape."""
    members, payload = (tensors.get(f"sealed.{label}.{part}", torch.zeros(0)) for part in ("members", "payload"))
    if members.ndim != 2 or members.shape[1] != ROW or payload.ndim != 1 or {members.dtype, payload.dtype} != {torch.uint8}:
        raise WireError(f"a sum must come with its members and its payload, got {tuple(members.shape)} and {tuple(payload.shape)}")
    rows = [bytes(row) for row in members.numpy()]
    pairs = ((int.from_bytes(row[:4], "little"), row[4 : 4 + NONCE]) for row in rows)
    return Total(tuple(pairs), payload.numpy(), tuple(row[4 + NONCE :] for row in rows))


def split(payload: np.ndarray, bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The words, uint32 (n,) of ``bits`` bits each, and the tail, uint64 (4,)."""
    body, tail = payload[: -8 * TAIL], np.ascontiguousarray(payload[-8 * TAIL :]).view("<u8").astype(np.uint64)
    if bits != 12:
        return np.ascontiguousarray(body).view(f"<u{bits // 8}").astype(np.uint32), tail
    low, middle, high = body.reshape(-1, 3).T.astype(np.uint32)
    return np.stack([low | (middle & 0x0F) << 8, middle >> 4 | high << 4], axis=1).reshape(-1), tail


def join(words: np.ndarray, tail: np.ndarray, bits: Bits) -> np.ndarray:
    """The payload of uint32 (n,), of which the low ``bits`` bits count, and uint64 (4,)."""
    if bits != 12:
        body = words.astype(f"<u{bits // 8}").view(np.uint8)
    else:
        first, second = words.reshape(-1, 2).T & 0xFFF
        body = np.stack([first & 0xFF, first >> 8 | (second & 0x0F) << 4, second >> 4], axis=1).astype(np.uint8).reshape(-1)
    return np.concatenate([body, tail.astype("<u8").view(np.uint8)])
