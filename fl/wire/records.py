"""Adapters and small facts <-> Flower's messages. The only file of `fl` that knows Flower.

What a stranger sent is measured before it is decoded: a message has these two records and no other, its facts are short, and
its array is as long as the uint8 (n,) that it says it is, so that a lie reserves no memory.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from io import BytesIO
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import InflatableObject, add_header_to_object_body, no_object_id_recompute

from fl.wire.flat import Packed, WireError, aligned

ADAPTER, FACTS, FLAT = "adapter", "facts", "flat"
LONGEST = 2**16  # characters of facts; those of a roll call are the longest and have two thousand
_ARRAYS: WeakKeyDictionary[Packed, Array] = WeakKeyDictionary()  # one adapter for all clients is serialised once


class TooLarge(WireError):
    """A message with more bytes than it may have."""


def to_content(facts: dict[str, Any], packed: Packed | None = None) -> RecordDict:
    """A message's content: JSON facts, and an adapter if there is one."""
    content = RecordDict({FACTS: ConfigRecord({"json": json.dumps(facts, separators=(",", ":"))})})
    if packed is not None:
        content[FACTS]["header"] = packed.header
        if packed not in _ARRAYS:
            _ARRAYS[packed] = Array(packed.payload)
        content[ADAPTER] = ArrayRecord({FLAT: _ARRAYS[packed]})
    return content


def facts_of(message: Message) -> dict[str, Any]:
    """The facts that `to_content` put in. Raises WireError when there are none, or more than that."""
    strangers = set(message.content) - {FACTS, ADAPTER}
    if strangers:
        raise WireError(f"a message must hold the records facts and adapter, got {sorted(map(str, strangers))[0][:40]!r}, too")
    try:
        if set(message.content[FACTS]) - {"json", "header"}:
            raise ValueError("more than json and header")
        text = message.content[FACTS]["json"]
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} characters")
        facts = json.loads(text)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message must carry its facts as JSON, got none that can be read ({type(error).__name__})") from None
    if not isinstance(facts, dict):
        raise WireError(f"a message's facts must be a JSON object, got {type(facts).__name__}")
    return facts


def carries(message: Message) -> bool:
    """Whether a message holds an adapter, or anything of one."""
    return ADAPTER in message.content or "header" in message.content[FACTS]


def packed_of(message: Message, most: int | None = None) -> Packed:
    """The packed adapter that `to_content` put in. Raises TooLarge beyond ``most`` bytes, and WireError when there is none."""
    try:
        header, record = message.content[FACTS]["header"], message.content[ADAPTER]
        if not isinstance(header, str) or set(record) != {FLAT}:
            raise TypeError("no text, or not one array")
        header.encode()
        data, claimed = record[FLAT].data, record[FLAT].dtype
        if most is not None and len(data) + len(header) > most:
            raise TooLarge(f"such a message has at most {most} bytes, got {len(data) + len(header)}")
        return Packed(header, _octets(data, claimed))
    except TooLarge:
        raise
    except Exception as error:  # whatever NumPy raises for what a stranger sent
        raise WireError(f"a message must carry one flat adapter, got none that can be read ({type(error).__name__})") from None


def _octets(data: bytes, claimed: str) -> np.ndarray:
    """uint8 (n,), the content of ``data``, which is an .npy file that must be exactly this long. Raises ValueError and TypeError."""
    size, start = _described(data[: 10 + int.from_bytes(data[8:10], "little")])
    if claimed != "uint8" or size != len(data) - start:
        raise ValueError("an array of another size or type than its bytes")
    return aligned(np.frombuffer(data, np.uint8, offset=start))


@lru_cache(maxsize=64)  # messages of a run have a few sizes, and NumPy reads each header as Python
def _described(head: bytes) -> tuple[int, int]:
    """The n of uint8 (n,) that an .npy header announces, and where its bytes begin. Raises ValueError and TypeError."""
    stream = BytesIO(head)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise TypeError("another format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.uint8 or len(shape) != 1:
        raise ValueError("an array of another type")
    return shape[0], stream.tell()


def serialised_bytes(message: Message) -> int:
    """Bytes of the message as Flower sends it: the sum over its serialised objects, without HTTP and TLS."""
    with no_object_id_recompute():  # or every object would be hashed again for each one above it
        return _bytes(_hollow(message))


def _hollow(message: Message) -> Message:
    """``message`` with zeros in the place of its adapter's bytes: an object's name is its hash, but long as any other's.

    What is too long for one of Flower's chunks stays, since chunks that are alike are sent once; and what no `to_content` made.
    """
    record = message.content.get(ADAPTER)
    if not isinstance(record, ArrayRecord) or set(record) != {FLAT}:
        return message
    array, size = record[FLAT], len(record[FLAT].data)
    usual = (array.dtype, array.stype) == ("uint8", "numpy.ndarray") and isinstance(array.shape, tuple)
    if not usual or [*map(type, array.shape)] != [int] or size > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE:
        return message
    hollow = copy.copy(message)
    hollow.content = RecordDict(dict(message.content) | {ADAPTER: _zeros(array.shape[0], size)})
    return hollow


@lru_cache(maxsize=4)
def _zeros(n: int, size: int) -> ArrayRecord:
    return ArrayRecord({FLAT: Array("uint8", (n,), "numpy.ndarray", bytes(size))})


def _bytes(part: InflatableObject) -> int:
    if isinstance(part, ArrayChunk):  # without a copy of what it holds
        size = len(part.data)
        return len(add_header_to_object_body(b"", part)) - len("0") + len(str(size)) + size
    return len(part.deflate()) + sum(map(_bytes, (part.children or {}).values()))
