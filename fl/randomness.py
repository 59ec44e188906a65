"""Randomness is an argument: every stream is derived from (seed, what it is for, round, client).

Not for secrets: what depends on the key comes from `fl.keys`.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed, a function of ``seed`` and ``purpose`` alone: SHA-256 of their text, first 8 bytes."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream that `derive` names."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
