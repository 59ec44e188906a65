"""Adapters and small facts <-> Flower's messages. The only file of `fl` that knows Flower."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject, no_object_id_recompute

from fl.wire.flat import Packed, WireError

ADAPTER, FACTS = "adapter", "facts"
_ARRAYS: WeakKeyDictionary[Packed, Array] = WeakKeyDictionary()  # one adapter for all clients is serialised once


def to_content(facts: dict[str, Any], packed: Packed | None = None) -> RecordDict:
    """A message's content: JSON facts, and an adapter if there is one."""
    content = RecordDict({FACTS: ConfigRecord({"json": json.dumps(facts, separators=(",", ":"))})})
    if packed is not None:
        content[FACTS]["header"] = packed.header
        if packed not in _ARRAYS:
            _ARRAYS[packed] = Array(packed.payload)
        content[ADAPTER] = ArrayRecord({"flat": _ARRAYS[packed]})
    return content


def facts_of(message: Message) -> dict[str, Any]:
    """The facts that `to_content` put in. Raises WireError when there are none."""
    try:
        facts = json.loads(message.content[FACTS]["json"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a message must carry its facts as JSON, got none that can be read ({type(error).__name__})") from None
    if not isinstance(facts, dict):
        raise WireError(f"a message's facts must be a JSON object, got {type(facts).__name__}")
    return facts


def packed_of(message: Message) -> Packed:
    """The packed adapter that `to_content` put in. Raises WireError when there is none."""
    try:
        header, payload = message.content[FACTS]["header"], message.content[ADAPTER]["flat"].numpy()
        if not isinstance(header, str) or not isinstance(payload, np.ndarray):
            raise TypeError("no text, or no array")
        return Packed(header, payload)
    except Exception as error:  # whatever NumPy raises for what a stranger sent
        raise WireError(f"a message must carry one flat adapter, got none that can be read ({type(error).__name__})") from None


def serialised_bytes(message: Message) -> int:
    """Bytes of the message as Flower sends it: the sum over its serialised objects, without HTTP and TLS."""
    with no_object_id_recompute():  # or every object would be hashed again for each one above it
        return _bytes(message)


def _bytes(part: InflatableObject) -> int:
    return len(part.deflate()) + sum(map(_bytes, (part.children or {}).values()))
