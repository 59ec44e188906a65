"""Files that are written whole or not at all, whenever the machine stops.

    write .<name>.<process>.part  →  flush it to the disk  →  rename it over <name>  →  flush the folder
"""

from __future__ import annotations

import os
from pathlib import Path


class IntegrityError(RuntimeError):
    """What a run keeps is not as it was written, or cannot be written where nothing else will do."""


def write(path: Path, content: bytes | str, mode: int | None = None) -> None:
    """Put ``content`` into ``path``; until the very end what stood there before stands. Raises OSError, and then leaves nothing.

    The file has its ``mode`` from the first byte on.

    A part that a process left behind when it was ended is cleared away by the next writing of a file whose name begins like
    it, as ``lost-00007`` and ``lost-00008`` do.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    for part in path.parent.glob(f".{stem(path)}*.part"):
        process = part.name.split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)  # whatever the umask is
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def destroy(path: Path) -> None:
    """Overwrite a file's bytes, then unlink it. Raises OSError. What a file system has copied elsewhere is out of reach."""
    with open(path, "r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync(path.parent)


def stem(path: Path) -> str:
    """A file's name without its round and its ending."""
    return path.name.split(".")[0].rstrip("0123456789")


def sync(folder: Path) -> None:
    """Make what was renamed in ``folder`` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
