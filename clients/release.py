"""A release signature: who may say which code runs on a node whose policy has ``[code] mode = "signed"``.

    signature = Ed25519(signer, "veilora release\\n" + code_sha256)        of a key that the owners of the nodes chose, nobody else's

The signer's key is made by `openssl genpkey -algorithm ed25519 -out signer.pem`, and stays off every node and coordinator.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl import durable


class ReleaseError(ValueError):
    """A release that is not signed by whom it must be: one line."""


def sign(key: Path, out: Path, code: str) -> str:
    """Write the signature over ``code``, 64 hex digits, by the PEM private key in ``key`` to ``out``; returns the public key in base64.

    Raises ReleaseError and OSError.
    """
    try:
        signer = load_pem_private_key(key.expanduser().read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ReleaseError(f"{key} must be an Ed25519 private key in PEM, without a password ({error})") from None
    if not isinstance(signer, Ed25519PrivateKey):
        raise ReleaseError(f"{key} must be an Ed25519 key; make one: openssl genpkey -algorithm ed25519 -out signer.pem")
    durable.write(out.expanduser(), _text(signer.sign(_message(code))) + "\n", 0o644)
    return _text(signer.public_key().public_bytes_raw())


def verify(signature: Path, signers: Sequence[str], code: str) -> str:
    """The one of ``signers``, public keys in base64, who signed ``code``. Raises ReleaseError when none did."""
    try:
        signed = base64.b64decode(signature.expanduser().read_text().strip(), validate=True)
        keys = {signer: Ed25519PublicKey.from_public_bytes(base64.b64decode(signer, validate=True)) for signer in signers}
    except (OSError, ValueError, binascii.Error) as error:
        raise ReleaseError(f"{signature} must be a release signature, and signers Ed25519 public keys, in base64 ({error})") from None
    for signer, key in keys.items():
        try:
            key.verify(signed, _message(code))
            return signer
        except InvalidSignature:
            continue
    raise ReleaseError(f"{signature} must be the signature of one of the {len(keys)} signers over the code {code}, and is not")


def _message(code: str) -> bytes:
    return f"veilora release\n{code}".encode()


def _text(octets: bytes) -> str:
    return base64.b64encode(octets).decode()
