"""A key file wrapped for one node by another, so that whoever carries it can neither read it nor put another in its place.

    K = HKDF-SHA256(X25519(e, N) | X25519(S, N), "veilora wrapped key" | E | N | S)        S: the sender's pair, N: the node's
    file = "veilora wrapped key 1\\n" | E | nonce | ChaCha20-Poly1305(K, nonce, the key file's bytes)

e is drawn anew for each file, E is its public half: what HPKE's auth mode does (RFC 9180), of which `cryptography` has the
base mode alone. Only who has N's private half reads the file, and only who has S's or N's can have made it. The coordinator
may carry it. The nonce is an HMAC over the key and random bytes, so that a cloned machine does not use one twice.

Pairs are PEM, as openssl reads them: `veilora key pair FILE` writes FILE (mode 0600) and FILE.pub. A pair is for one taking:
with a private half that stayed, a disk stolen later would open the file that the coordinator had recorded, and so the key
of that epoch and of all that follow from it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key, load_pem_public_key,
)  # fmt: skip

from fl import durable, keys, seal_key
from fl.keys import BYTES, KeyFileError
from fl.seal_key import EPOCH

MAGIC = b"veilora wrapped key 1\n"
POINT, NONCE = 32, 12  # bytes
MOST = 2**12           # bytes of a PEM file that is read


def pair(path: Path) -> str:
    """Make a node's pair: ``path`` (mode 0600) and ``path``.pub. Returns the public half's fingerprint.

    Raises KeyFileError if something stands at either.
    """
    path, private = path.expanduser(), X25519PrivateKey.generate()
    if os.path.lexists(public_of(path)):
        raise KeyFileError(f"a key must not be overwritten: {public_of(path)} exists; choose another path or move it away")
    keys.place(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    durable.write(public_of(path), private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return fingerprint(private.public_key())


def public_of(path: Path) -> Path:
    """Where the public half of the pair ``path`` lies."""
    return path.with_name(path.name + ".pub")


def fingerprint(public: X25519PublicKey) -> str:
    """Sixteen hex digits by which two people on the telephone know a public half."""
    return hashlib.sha256(b"veilora pair" + public.public_bytes_raw()).hexdigest()[:16]


def private_in(path: Path) -> X25519PrivateKey:
    """A node's private half. Raises KeyFileError, naming the fix."""
    name = f"the pair {path.expanduser()}"
    try:
        key = load_pem_private_key(keys.octets(path, MOST, name, "veilora key pair", exact=False), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if isinstance(error, KeyFileError):
            raise
        key = None
    if not isinstance(key, X25519PrivateKey):
        raise KeyFileError(f"{name} must be a private X25519 key in PEM; make one with: veilora key pair FILE")
    return key


def public_in(path: Path) -> X25519PublicKey:
    """A node's public half. Raises KeyFileError, naming the fix."""
    try:
        with path.expanduser().open("rb") as file:
            key = load_pem_public_key(file.read(MOST))
    except OSError as error:
        raise KeyFileError(f"the public key {path} cannot be read ({error.strerror}); it is what veilora key pair writes as FILE.pub") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, X25519PublicKey):
        raise KeyFileError(f"the public key {path} must be an X25519 key in PEM; it is what veilora key pair writes as FILE.pub")
    return key


def wrap(content: bytes, to: X25519PublicKey, sender: X25519PrivateKey) -> bytes:
    """``content`` for the node ``to`` alone, by ``sender``. Raises KeyFileError for a public half that hides nothing."""
    once = X25519PrivateKey.generate()
    try:
        shared = once.exchange(to) + sender.exchange(to)
    except ValueError:
        raise KeyFileError("a public half must be a point of full order; have its node make another pair: veilora key pair FILE") from None
    head = once.public_key().public_bytes_raw()
    key = _key(shared, head, to, sender.public_key())
    nonce = hmac.digest(shared, secrets.token_bytes(BYTES) + content, "sha256")[:NONCE]
    return MAGIC + head + nonce + ChaCha20Poly1305(key).encrypt(nonce, content, MAGIC)


def unwrap(wrapped: bytes, own: X25519PrivateKey, sender: X25519PublicKey) -> bytes:
    """The content that ``sender`` wrapped for the node ``own``.

    Raises KeyFileError when it is no such file, was changed, is for another node, or from another sender.
    """
    head, rest = wrapped[len(MAGIC) : len(MAGIC) + POINT], wrapped[len(MAGIC) + POINT :]
    try:
        if not wrapped.startswith(MAGIC):
            raise ValueError("another kind of file")
        once = X25519PublicKey.from_public_bytes(head)
        key = _key(own.exchange(once) + own.exchange(sender), head, own.public_key(), sender)
        return ChaCha20Poly1305(key).decrypt(rest[:NONCE], rest[NONCE:], MAGIC)
    except (ValueError, InvalidTag):
        says = "a shared key must be as its sender wrote it for this node: it was changed, is for another node, or from another sender"
        raise KeyFileError(says) from None


def share(path: Path, to: Path, own: Path, out: Path) -> str:
    """Wrap the key file ``path``, a seal key or an image key, for the node whose public half is in ``to``.

    ``own`` is this node's pair, ``out`` the new file. Returns the fingerprint of the key. Raises KeyFileError.
    """
    content = _content(path)
    return _write(content, public_in(to), private_in(own), out)


def rotate(path: Path, to: list[Path], revoke: list[Path], own: Path, out: Path) -> dict[str, str]:
    """Put a fresh secret in the place of the seal key ``path`` and wrap it for each of ``to`` who is not in ``revoke``.

    Writes ``out``/<name>.wrapped for each <name>.pub, and returns {file: fingerprint of the node's public half}. Whoever was
    revoked, or has not taken the file, opens nothing new. Nothing is changed unless every file could be read. Raises KeyFileError.
    """
    private, gone = private_in(own), {public_in(p).public_bytes_raw() for p in revoke}
    files = {out.expanduser() / f"{p.name.removesuffix('.pub')}.wrapped": public_in(p) for p in to}
    files = {file: public for file, public in files.items() if public.public_bytes_raw() not in gone}
    if not files:
        raise KeyFileError("a rotated key must be for one node at least: name the public halves of those who stay with --to")
    if len(files) + len({p for p in to if public_in(p).public_bytes_raw() in gone}) != len(to):
        raise KeyFileError("public halves must have different file names, since each node's wrapped key is named by its own; rename one")
    _new(*files)
    content = seal_key.rotate(path).content()
    for file, public in files.items():
        _write(content, public, private, file)
    return {str(file): fingerprint(public) for file, public in files.items()}


def take(wrapped: Path, sender: Path, own: Path, path: Path, keep: bool = False) -> tuple[str, bool]:
    """Put the key that ``sender`` wrapped for this node into ``path``; its fingerprint, and whether it is new there.

    A seal key takes the place of one of an earlier epoch; an image key that is there is never overwritten. Then the pair
    ``own`` is destroyed, unless it is to ``keep``. Raises KeyFileError.
    """
    try:
        with wrapped.expanduser().open("rb") as file:
            content = unwrap(file.read(MOST), private_in(own), public_in(sender))
    except OSError as error:
        raise KeyFileError(f"the shared key {wrapped} cannot be read ({error.strerror}); name the file that veilora key share wrote") from None
    if len(content) == BYTES + EPOCH:
        key = seal_key.of(content)
        new = seal_key.take(path, key)
    else:
        key, new = keys.SharedKey(content), True
        keys.place(path, content)
    if not keep:
        durable.destroy(own.expanduser())
        public_of(own.expanduser()).unlink(missing_ok=True)
    return key.fingerprint, new


def _key(shared: bytes, head: bytes, to: X25519PublicKey, sender: X25519PublicKey) -> bytes:
    info = b"veilora wrapped key" + head + to.public_bytes_raw() + sender.public_bytes_raw()
    return HKDF(SHA256(), BYTES, salt=None, info=info).derive(shared)


def _content(path: Path) -> bytes:
    """The content of a key file: of a seal key with its epoch."""
    size = path.expanduser().stat().st_size if path.expanduser().exists() else 0
    return keys.octets(path, BYTES, f"key file {path}", "veilora keygen") if size == BYTES else seal_key.read(path).content()


def _write(content: bytes, to: X25519PublicKey, own: X25519PrivateKey, out: Path) -> str:
    _new(out)
    out.expanduser().parent.mkdir(parents=True, exist_ok=True)
    durable.write(out.expanduser(), wrap(content, to, own), 0o600)
    return seal_key.of(content).fingerprint if len(content) == BYTES + EPOCH else keys.SharedKey(content).fingerprint


def _new(*files: Path) -> None:
    for file in files:
        if os.path.lexists(file.expanduser()):
            raise KeyFileError(f"a wrapped key must not be overwritten: {file} exists; choose another folder or remove it")
