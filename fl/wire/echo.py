"""Echoes: each client tells the others, past a server that must not know it, on what it stands, beside each message.

    echo = AES-SIV(K_echo; run | round | client | nonce; SHA256(bound)[:16])        32 bytes

``bound`` is what the message itself is bound to (`fl.wire.transcript`). Who takes a sum opens the echo of every member: one
that opens to another ``bound`` comes from a client that was shown another history. One that does not open is no message of
that client in this round: changed, replayed, or made without the key. AES-SIV (RFC 5297) needs no nonce, so no random source
that fails and no cloned machine can give anything away.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from fl.seal_key import SealKey

SHORT = 16  # bytes of the digest


def echo(key: SealKey, run: str, bound: str, round: int, client: int, nonce: bytes) -> bytes:
    """The echo of a ``client`` whose message has this ``nonce`` and is ``bound`` so."""
    return _box(key).encrypt(_short(bound), [_place(run, round, client, nonce)])


def echoes(key: SealKey, run: str, bound: str, round: int, client: int, nonce: bytes, heard: bytes) -> bool | None:
    """Whether ``heard`` is the echo of one who stands on ``bound``: False on another, None where it is no echo of that message."""
    try:
        return _box(key).decrypt(heard, [_place(run, round, client, nonce)]) == _short(bound)
    except (InvalidTag, ValueError):
        return None


def _box(key: SealKey) -> AESSIV:
    return AESSIV(key.stream("echo", 64))


def _place(run: str, round: int, client: int, nonce: bytes) -> bytes:
    return f"{run}|{round}|{client}|".encode() + nonce


def _short(bound: str) -> bytes:
    return hashlib.sha256(bound.encode()).digest()[:SHORT]
