"""A run's record: a chain of lines in which nothing can be changed, left out or put in without changing its end.

    record.jsonl    line n holds H_{n-1}        H_n = SHA256(line n), a line being JSON with sorted keys and no spaces

    begin     the run, its clients, the digests of the files that it began with, the nodes' public keys, in a secure run T_0
    round     the digest of the round's row in rounds.jsonl; in a secure run who is in the sum, its digest and T_r
    resumed   the round after which the run goes on: lines are added and never taken away
    end       the digests of what the run left
    closed    the nodes' signatures of the end

A node that has a key signs H_n when it answers, with its own T in a secure run; the next line holds the signatures. Without
them a chain shows damage and no forger: who may write the folder can write it all anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fl import durable
from fl.durable import IntegrityError

NAME = "record.jsonl"
FIELDS = {  # by kind: those that a line must have, and those that it may have, beside line, kind and before
    "begin": ({"run", "clients", "files", "signers"}, {"key", "transcript"}),
    "round": ({"round", "row"}, {"sum", "signed"}),
    "resumed": ({"after"}, set()),
    "end": ({"files"}, set()),
    "closed": ({"signed"}, set()),
}


class Head(NamedTuple):
    """A line's number and its digest, which stands for all lines up to it."""

    line: int
    digest: str


class Record:
    """The record of one run, in the file ``path``; nothing is touched before the first line."""

    def __init__(self, path: Path) -> None:
        self.path, self._lines, self._kept = path, [], 0

    def add(self, kind: str, **what: Any) -> None:
        """Put a line at the end. Raises OSError where it cannot be written; it is then written with the next."""
        before = digest(self._lines[-1]) if self._lines else ""
        self._lines.append(written({"line": len(self._lines), "kind": kind, "before": before, **what}))
        durable.write(self.path, "".join(line + "\n" for line in self._lines))
        self._kept = len(self._lines)

    def reopen(self) -> list[dict[str, Any]]:
        """Go on with what is in the file, and return its lines. Raises IntegrityError where they are not as they were written."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"a run's folder must hold {NAME}, but it cannot be read ({error.strerror}); start the run anew") from None
        lines = chain(content)
        self._lines = content.decode().split("\n")[:-1]
        self._kept = len(self._lines)
        return lines

    @property
    def head(self) -> Head:
        """The newest line that is on the disk: what a node may be shown, since it will not be taken back."""
        return Head(self._kept - 1, digest(self._lines[self._kept - 1]))


def written(line: Mapping[str, Any]) -> str:
    """``line`` as it stands in the file, without its end."""
    return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(content: str | bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def chain(content: bytes) -> list[dict[str, Any]]:
    """The lines in ``content``. Raises IntegrityError, naming the first line that is not as it was written or not in its place."""
    *lines, rest = content.split(b"\n")
    found: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        try:
            one = json.loads(line)
            must, may = FIELDS[one["kind"]]
            if written(one).encode() != line or not must <= set(one) - {"line", "kind", "before"} <= must | may:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise IntegrityError(f"line {n} of {NAME} is not as it was written") from None
        if one["line"] != n or type(one["line"]) is not int:
            raise IntegrityError(f"line {n} of {NAME} must say its number, got {str(one['line'])[:40]}")
        if one["before"] != (digest(lines[n - 1]) if n else ""):
            raise IntegrityError(f"line {n} of {NAME} must hold the digest of the line before it: one of the two was changed")
        if (one["kind"] == "begin") != (n == 0):
            raise IntegrityError(f"line {n} of {NAME} is of the kind {one['kind']}: a record begins once")
        found.append(one)
    if rest or not found:
        raise IntegrityError(f"{NAME} must end with a whole line; it was cut")
    return found


def text(run: str, head: Head, transcript: str = "") -> bytes:
    """The text that a node signs: that it was shown this ``head``, and in a secure run that it stands on this ``transcript`` (hex)."""
    return f"veilora record|{run}|{head.line}|{head.digest}|{transcript}".encode()


def sign(key: ec.EllipticCurvePrivateKey, said: bytes) -> str:
    """ECDSA on P-384 with SHA-384, in hex."""
    return key.sign(said, ec.ECDSA(SHA384())).hex()


def signer(public: str) -> Callable[[str, bytes], bool]:
    """A test of whether a signature (hex) over a text is of the ``public`` key, one OpenSSH line. Raises ValueError for any other key."""
    try:
        key = load_ssh_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    known = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
    if not known or key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() != public:
        raise ValueError("a node's public key must be one of P-384 in OpenSSH's format")

    def holds(signature: str, said: bytes) -> bool:
        try:
            octets = bytes.fromhex(signature)
            key.verify(octets, said, ec.ECDSA(SHA384()))
        except (ValueError, TypeError, InvalidSignature):
            return False
        return octets.hex() == signature

    return holds
