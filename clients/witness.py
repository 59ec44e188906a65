"""A node as a witness of the run's record: it signs what it was shown, and never two things for one line.

The key is the node's own (P-384), by which the coordinator knows it. What was signed last stands in the client's drawer, so
that a server which shows another record later, or an older one, is named, whatever process it asks.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Mapping

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from clients.local import Client
from clients.state import StateError
from fl.config import Config
from fl.keys import KeyFileError
from fl.record import Head, sign, text
from fl.wire.flat import WireError

SHOWN = "shown"  # the file's name
NEVER = 2**53    # lines that no record has
RECORDS = "record: two records"
log = logging.getLogger("veilora.client")


class TwoRecords(StateError):
    """The server has shown this node two records of one run."""


def public(config: Config) -> str:
    """The public half of the node's key, one OpenSSH line; "" for a node without. Raises KeyFileError."""
    if not config.node_key:
        return ""
    return _key(config.node_key).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def attest(client: Client, facts: Mapping[str, Any], transcript: str = "") -> dict[str, str]:
    """``signature`` (hex) of the record's head in ``facts`` and of the ``transcript`` (hex) that this client stands on.

    Nothing where the node has no key or was shown no head. Raises TwoRecords for another head than it has signed for that
    line, and for an older line; WireError for what is no head; KeyFileError.
    """
    if not client.config.node_key or "head" not in facts:
        return {}
    head, run, drawer = _head(facts["head"]), str(facts["run"]), client.drawer(str(facts["run"]))
    last = drawer.recall(SHOWN, NEVER)
    if last and (last[0] > head.line or last[0] == head.line and bytes(last[1]["digest"].tolist()).hex() != head.digest):
        log.error("%s: %s: this node has signed line %d, and is now shown another line %d", run, RECORDS, last[0], head.line)
        raise TwoRecords(RECORDS)
    if last is None or last[0] < head.line:
        drawer.keep(SHOWN, head.line, {"digest": torch.tensor(list(bytes.fromhex(head.digest)), dtype=torch.uint8)})
        if last:
            drawer.forget(SHOWN, last[0])
    return {"signature": sign(_key(client.config.node_key), text(run, head, transcript))}


def _head(said: Any) -> Head:
    line, digest = said if isinstance(said, list) and len(said) == 2 else (None, None)
    if type(line) is not int or not 0 <= line < NEVER or not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise WireError(f"a record's head must be a line's number and digest, got {str(said)[:40]}")
    return Head(line, digest)


def _key(path: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(Path(path).expanduser().read_bytes(), None)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"node key {path} must be an OpenSSH private key ({type(error).__name__}); see node-key-path") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise KeyFileError(f"node key {path} must be one of P-384; take the one that the SuperNode has, see node-key-path")
    return key
