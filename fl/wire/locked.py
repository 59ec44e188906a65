"""Tensors that only a holder of the key can read, and nobody can change: what the server keeps of a run for the clients.

    salt (20 bytes), nonce (12 bytes) = HMAC(K_nonce, fresh random bytes | start | round | plain)
    locked = salt | nonce | AES-256-GCM(HMAC(K_lock, start | round | salt), nonce, plain, bound to start and round)

``start`` is T_0 of the run's transcript and ``round`` the one after which the client that locks stands itself. Each lock has
a key of its own, and salt and nonce depend on what is locked: a frozen random source or a cloned machine repeats them for
the same tensors alone.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Mapping

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.torch import load, save
from torch import Tensor

from fl.seal_key import SealKey
from fl.wire.masks import SealError

SALT, HEAD = 20, 32  # bytes: the salt, and with the nonce


def lock(key: SealKey, start: bytes, round: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """uint8 (n,): ``tensors`` as they stand after ``round`` of the run that begins at ``start``."""
    plain, bound = save({n: t.clone().contiguous() for n, t in tensors.items()}), _bound(start, round)
    state = hmac.new(key.stream("blind checkpoint nonce", 32), secrets.token_bytes(32) + bound, "sha256")
    state.update(plain)
    head = state.digest()
    return torch.frombuffer(bytearray(head + _box(key, bound, head).encrypt(head[SALT:], plain, bound)), dtype=torch.uint8)


def unlock(key: SealKey, start: bytes, round: int, locked: Tensor) -> dict[str, Tensor]:
    """What was locked. Raises SealError when it was changed, or is of another run or round, or under another key."""
    octets, bound = np.ascontiguousarray(locked.numpy()).tobytes(), _bound(start, round)
    head, rest = octets[:HEAD], octets[HEAD:]
    try:
        return load(_box(key, bound, head).decrypt(head[SALT:], rest, bound))
    except (InvalidTag, ValueError):
        raise SealError(f"the state of round {round} must be as a client locked it: changed, or of another run, round or key") from None


def _box(key: SealKey, bound: bytes, head: bytes) -> AESGCM:
    return AESGCM(hmac.digest(key.stream("blind checkpoint", 32), bound + head[:SALT], "sha256"))


def _bound(start: bytes, round: int) -> bytes:
    return start + round.to_bytes(8, "big")
