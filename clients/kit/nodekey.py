"""A node's own key: made on the node, so that its private half is on no other machine; the public half goes to the operator."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from clients.kit import KitError, certificates
from fl import durable


def create(folder: Path) -> bytes:
    """Make ``node.key`` (mode 0600) and ``node.pub`` in ``folder``, which is made. Returns the public key, one OpenSSH line.

    Raises KitError when a key stands there already.
    """
    for name in ("node.key", "node.pub"):
        if (folder / name).exists() or (folder / name).is_symlink():
            raise KitError(f"a node's key must not be overwritten: {folder / name} exists; choose another folder or move it away")
    pair = certificates.node_key()
    folder.mkdir(parents=True, exist_ok=True)
    durable.write(folder / "node.key", pair.private, 0o600)
    durable.write(folder / "node.pub", pair.public, 0o644)
    return pair.public


def public(path: Path) -> bytes:
    """The public key in a file that `create` wrote, as one OpenSSH line without a comment. Raises KitError."""
    try:
        content = path.read_bytes()
        key = None if b"PRIVATE" in content else load_ssh_public_key(content)
    except (OSError, ValueError) as error:
        raise KitError(f"{path} must be a node's public key; take the node.pub of `veilora node init` ({error})") from None
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
        raise KitError(f"{path} must be a public EC key on P-384 in OpenSSH's format; take the node.pub of `veilora node init`")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def publics(paths: list[Path]) -> list[bytes]:
    """The public keys in ``paths``, in their order. Raises KitError when two are the same."""
    keys = [public(path) for path in paths]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise KitError(f"each node must have a key of its own, but {paths[i]} holds the one of {paths[keys.index(key)]}")
    return keys
