"""SealKey: the secret that hides updates from the server, and that ages.

    K_{e+1} = HKDF(K_e, "next")        e: the epoch. A step at the end of a run; the old bytes go, and there is no way back

Masks, tags, locks and echoes come from this key alone, and pictures from the image key alone. So this one can step without
a picture being encrypted anew, and a disk that is stolen opens no message of an earlier epoch. What it does not help
against: bytes that a file system has copied elsewhere (snapshots, backups, worn flash cells). An encrypted disk does.

    <file>      32 secret bytes | the epoch, 8 bytes, big-endian        mode 0600, in a folder that its owner may write
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from fl import durable
from fl.keys import BYTES, KeyFileError, Secret, octets, place

EPOCH = 8       # bytes
LEAP = 100      # epochs, at most, that a key steps at one word of the server's
ROTATED = 10**9  # a fresh secret begins at the next multiple: at LEAP a word no server leads a node with the old one past it


class SealKeyFileError(KeyFileError):
    """A seal key file that must not be used, or that cannot step; ``rule`` says which, where a coordinator may hear it."""

    settings, RULES = ("seal_key",), ("the seal key is too far behind",)
    rule = ""


class SealKey(Secret):
    """The secret of one epoch. Its ``fingerprint`` names the epoch, as in ``3-b6b84e55f15c5292``."""

    __slots__ = ("epoch",)
    _salt = b"veilora seal"

    def __init__(self, secret: bytes, epoch: int = 0) -> None:
        """Raises ValueError unless ``secret`` has 32 bytes and ``epoch`` is a number of 64 bits."""
        if not 0 <= epoch < 2 ** (8 * EPOCH):
            raise ValueError(f"an epoch must be at least 0 and below 2^64, got {epoch}")
        object.__setattr__(self, "epoch", epoch)
        super().__init__(secret)
        object.__setattr__(self, "fingerprint", f"{epoch}-{self.fingerprint}")

    def next(self) -> SealKey:
        """The key of the next epoch."""
        return SealKey(self._derive("next", BYTES), self.epoch + 1)

    def content(self) -> bytes:
        """The bytes of its file: for that file, and to be wrapped for another node, alone."""
        return self._secret + self.epoch.to_bytes(EPOCH, "big")


def fresh(epoch: int = 0) -> SealKey:
    """A new random key of ``epoch``."""
    return SealKey(secrets.token_bytes(BYTES), epoch)


def of(content: bytes) -> SealKey:
    """The key in the ``content`` of its file."""
    return SealKey(content[:BYTES], int.from_bytes(content[BYTES:], "big"))


def create(path: Path) -> SealKey:
    """Write a new random key to ``path`` (mode 0600). Raises KeyFileError if something already stands there."""
    place(path, fresh().content())
    return read(path)


def read(path: Path) -> SealKey:
    """The key in the file ``path`` as it stands now. Raises KeyFileError, naming the fix, for a file that must not be used."""
    path = path.expanduser()
    if os.path.lexists(_old(path)):  # a step that was broken off: what it left goes before anything is done with the key
        with _alone(path):
            _sweep(path)
    return of(octets(path, BYTES + EPOCH, f"seal key {path}", "veilora keygen --seal", error=SealKeyFileError))


def advance(path: Path, epoch: int) -> SealKey:
    """Let the key in ``path`` step until it stands at ``epoch``; where it stands there or further on, it stays. Returns it.

    Any number of processes may do so at once. Raises KeyFileError for a file that must not be used or cannot be written, and
    for more than ``LEAP`` steps.
    """
    path = path.expanduser()
    with _alone(path):
        _sweep(path)
        key = read(path)
        if epoch - key.epoch > LEAP:
            error = SealKeyFileError(f"seal key {path} stands at epoch {key.epoch}, too far behind to step; have it shared anew: veilora key share")
            (error.rule,) = error.RULES
            raise error
        if epoch > key.epoch:
            while key.epoch < epoch:
                key = key.next()
            _replace(path, key)
    return key


def rotate(path: Path) -> SealKey:
    """Put a fresh secret in the place of the key in ``path``, at the next multiple of ``ROTATED``. Returns it."""
    path = path.expanduser()
    with _alone(path):
        _sweep(path)
        key = fresh((read(path).epoch // ROTATED + 1) * ROTATED)
        _replace(path, key)
    return key


def take(path: Path, key: SealKey) -> bool:
    """Put ``key``, which another node gave, into ``path``. False where it is there already.

    Raises KeyFileError unless its epoch is beyond that of the key there: an old file that is carried anew must not bring an
    old key back.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(path):
        _sweep(path)
        if not os.path.lexists(path):
            place(path, key.content())
            return True
        own = read(path)
        if own == key:
            return False
        if key.epoch <= own.epoch:
            raise SealKeyFileError(f"a seal key goes forward only: {path} stands at epoch {own.epoch}, and what was shared is of epoch {key.epoch}")
        _replace(path, key)
    return True


def _replace(path: Path, key: SealKey) -> None:
    """Write ``key``; then overwrite and unlink the bytes that stood there, also where this is broken off halfway."""
    try:
        owner = path.stat()
        os.link(path, _old(path))
        durable.write(path, key.content(), 0o600)
        if owner.st_uid != os.geteuid():  # root did this for a service's user
            os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise SealKeyFileError(f"seal key {path} must be in a folder that its owner may write, but cannot be replaced ({error.strerror})") from None
    _sweep(path)


def _sweep(path: Path) -> None:
    """Destroy what a step that was broken off left: of the key before, or of one that came to nothing. Raises KeyFileError."""
    try:
        for left in (_old(path), *path.parent.glob(f".{path.name}.*.part")):
            if not os.path.lexists(left):
                continue
            if path.exists() and os.path.samefile(left, path):
                left.unlink()  # another name of the key itself: no step had been taken yet
            else:
                durable.destroy(left)
    except OSError as error:
        says = f"seal key {path} must be in a folder that its owner may write: what a step left cannot be destroyed"
        raise SealKeyFileError(f"{says} ({error.strerror})") from None


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The folder of ``path``, locked against every other process and thread that changes the key."""
    try:
        handle = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise SealKeyFileError(f"seal key {path} cannot be read ({error.strerror}); make one with: veilora keygen --seal {path}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
