"""SharedKey: the 32 secret bytes that encrypt pictures. Clients hold them and the server never does.

Everything keyed comes from HKDF-SHA256 (RFC 5869) with one ``info`` string for each purpose, so that no purpose learns
another's stream, and from AES-256-CTR as the stream. No NumPy or torch generator is involved: their streams may change
between versions, and a permutation must stay the same for ever.

    python -m fl.keys PATH      makes a key file (mode 0600) and prints its fingerprint
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import sys
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

BYTES = 32
CREDENTIAL = 0o440  # the most that systemd sets: an access list that lets the service's user in shows as the group's bit


class KeyFileError(ValueError):
    """A key file that must not be used; the message names the fix and never the content."""


class Secret:
    """Thirty-two secret bytes, seen only through what is derived from them. ``repr`` shows the fingerprint alone."""

    __slots__ = ("_secret", "fingerprint")
    _salt = b"veilora"  # HKDF's: another for each kind of secret

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError unless ``secret`` has 32 bytes."""
        if len(secret) != BYTES:
            raise ValueError(f"a key must have {BYTES} bytes, got {len(secret)}")
        object.__setattr__(self, "_secret", bytes(secret))
        object.__setattr__(self, "fingerprint", self._derive("fingerprint", 8).hex())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a key does not change; make another")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a key does not change; make another")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fingerprint})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.fingerprint == other.fingerprint and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self):
        raise TypeError("a key is never pickled; send its fingerprint, or read the key file on the other side")

    def stream(self, purpose: str, nbytes: int) -> bytes:
        """``nbytes`` keyed pseudo-random bytes: AES-256-CTR from a zero counter under the purpose's own key."""
        return self._keystream(f"stream {purpose}").update(bytes(nbytes))

    def _keystream(self, purpose: str) -> CipherContext:
        return Cipher(algorithms.AES(self._derive(purpose, 32)), modes.CTR(bytes(16))).encryptor()

    def _derive(self, info: str, nbytes: int) -> bytes:
        return HKDF(SHA256(), nbytes, salt=self._salt, info=info.encode()).derive(self._secret)


class SharedKey(Secret):
    """The image key: what pictures are permuted and inverted by."""

    __slots__ = ()

    def permutation(self, purpose: str, n: int) -> Tensor:
        """int64 (n,), uniform over the n! orders: Fisher-Yates, its draws unbiased by rejection."""
        words = self._words(f"permutation {purpose}")
        order = list(range(n))
        for last in range(n - 1, 0, -1):
            bound = last + 1
            limit = 2**32 - 2**32 % bound
            draw = next(word for word in words if word < limit) % bound
            order[last], order[draw] = order[draw], order[last]
        return torch.tensor(order, dtype=torch.int64)

    def signs(self, purpose: str, n: int) -> Tensor:
        """bool (n,), each fair and independent."""
        octets = np.frombuffer(self._keystream(f"signs {purpose}").update(bytes(-(-n // 8))), np.uint8)
        return torch.from_numpy(np.unpackbits(octets)[:n].astype(bool))

    def _words(self, purpose: str):
        """Uniform 32-bit words without end: the purpose's stream, read big-endian, 4 kB at a time."""
        keystream = self._keystream(purpose)
        while True:
            yield from np.frombuffer(keystream.update(bytes(4096)), ">u4").tolist()


def create(path: Path) -> SharedKey:
    """Write a new random key to ``path`` (mode 0600). Raises KeyFileError if something already stands there."""
    place(path, secrets.token_bytes(BYTES))
    return read(path)


def read(path: Path) -> SharedKey:
    """The key in the file ``path``. Raises KeyFileError as `octets` does, and when it is not 32 bytes long."""
    secret = octets(path, BYTES, f"key file {path.expanduser()}", "python -m fl.keys")
    return SharedKey(secret)


def place(path: Path, content: bytes) -> None:
    """Write ``content`` to the new file ``path`` (mode 0600). Raises KeyFileError if something already stands there."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise KeyFileError(f"a key must not be overwritten: {path} exists; choose another path or move it away") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def octets(path: Path, nbytes: int, name: str, maker: str, exact: bool = True, error: type[KeyFileError] = KeyFileError) -> bytes:
    """The ``nbytes`` bytes, or up to so many, of the secret file ``path``; errors have its ``name`` and the command that makes one.

    Raises ``error``, naming the fix, when the path is missing, a link, a folder or another kind of thing, open to
    group or others, unreadable, or of another length.
    """
    path = path.expanduser()
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise error(f"{name} is missing; carry it from the client that has it, or make the first: {maker} {path}") from None
    except OSError as reason:
        if path.is_symlink():
            raise error(f"{name} must not be a link; name the file itself") from None
        raise error(f"{name} cannot be read ({reason.strerror}); run: chmod 600 {path}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{name} must be a plain file; make one with: {maker} FILE")
        mode = stat.S_IMODE(status.st_mode)
        if mode & ~CREDENTIAL if path.parent == credentials() else mode & 0o077:
            raise error(f"{name} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
        content = os.read(handle, nbytes + 1)
    finally:
        os.close(handle)
    if exact and len(content) != nbytes:
        size = "more" if len(content) > nbytes else len(content)
        raise error(f"{name} must hold {nbytes} bytes, got {size}; copy it again from another client")
    return content


def credentials() -> Path | None:
    """The folder in which systemd lays out a service's credentials (`LoadCredentialEncrypted=`); None outside a service."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) if folder else None


def main(arguments: list[str]) -> int:
    """The command that makes a key. Returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m fl.keys PATH", file=sys.stderr)
        return 2
    try:
        key = create(Path(arguments[0]))
    except (KeyFileError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{Path(arguments[0]).expanduser()}: fingerprint {key.fingerprint}. Give it to every client, never to the server.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
