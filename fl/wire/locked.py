"""Tensors that only a holder of the key can read, and nobody can change: what the server keeps of a run for the clients.

    nonce (12 bytes, fresh) | AES-256-GCM(key "blind checkpoint", safetensors, bound to run and round)
"""

from __future__ import annotations

import secrets
from typing import Mapping

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.torch import load, save
from torch import Tensor

from fl.keys import SharedKey
from fl.wire.masks import SealError

NONCE = 12


def lock(key: SharedKey, run: str, round: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """uint8 (n,): ``tensors`` as they stand after ``round`` of ``run``."""
    nonce, plain = secrets.token_bytes(NONCE), save({n: t.clone().contiguous() for n, t in tensors.items()})
    return torch.frombuffer(bytearray(nonce + _box(key).encrypt(nonce, plain, _bound(run, round))), dtype=torch.uint8)


def unlock(key: SharedKey, run: str, round: int, locked: Tensor) -> dict[str, Tensor]:
    """What was locked. Raises SealError when it was changed, or is of another run or round, or under another key."""
    octets = np.ascontiguousarray(locked.numpy()).tobytes()
    try:
        return load(_box(key).decrypt(octets[:NONCE], octets[NONCE:], _bound(run, round)))
    except (InvalidTag, ValueError):
        raise SealError(f"the state of round {round} must be as a client locked it: changed, or of another run, round or key") from None


def _box(key: SharedKey) -> AESGCM:
    return AESGCM(key.stream("blind checkpoint", 32))


def _bound(run: str, round: int) -> bytes:
    return f"{run}|{round}".encode()
