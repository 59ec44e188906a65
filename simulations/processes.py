"""Processes of Linux, as /proc tells of them: who descends from whom, what they hold in memory, and how to end them all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, NamedTuple

PROC = Path("/proc")


class Memory(NamedTuple):
    """Bytes of a process and all that descend from it: ``rss`` counts what they share for each, ``pss`` once."""

    rss: int
    pss: int


def tree(root: int) -> list[int]:
    """``root`` and all processes that descend from it, parents before children; nothing if it is gone."""
    children: dict[int, list[int]] = {}
    for status in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])  # the name before it may hold anything
        except OSError:
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [root] if (PROC / str(root)).exists() else []
    for pid in found:
        found += children.get(pid, [])
    return found


def memory(root: int) -> Memory:
    """What the process ``root`` and its descendants hold now; zero once they are gone."""
    rss = pss = 0
    for pid in tree(root):
        own = alone(pid)
        rss, pss = rss + own.rss, pss + own.pss
    return Memory(rss, pss)


def alone(pid: int) -> Memory:
    """The memory that one process holds without its descendants; zero once it is gone.

    One that lets its own user not look in (`clients.hardening`) tells of its resident bytes alone, which then stand for both.
    """
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except PermissionError:
        return resident(pid)
    except OSError:
        return Memory(0, 0)
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return Memory(*(1024 * int(sizes.get(name, "0 kB").split()[0]) for name in ("Rss", "Pss")))


def resident(pid: int) -> Memory:
    """The resident bytes of a process, as everybody may know them, for both numbers; zero once it is gone."""
    try:
        pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return Memory(0, 0)
    return Memory(pages * os.sysconf("SC_PAGE_SIZE"), pages * os.sysconf("SC_PAGE_SIZE"))


def end(process: subprocess.Popen, grace: float = 10) -> None:
    """End ``process``, which leads a group of its own, and all that descends from it: asked first, killed after ``grace`` seconds."""
    family = tree(process.pid) if process.poll() is None else []
    if grace:
        _send(os.killpg, process.pid, signal.SIGTERM)
        _wait(process, family, grace)
    for pid in family:
        _send(os.kill, pid, signal.SIGKILL)
    _send(os.killpg, process.pid, signal.SIGKILL)
    _wait(process, family, 10)


def free_ports(number: int) -> range:
    """So many ports of 127.0.0.1, one after the other, on which nobody listens now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports = range(first := probe.getsockname()[1], first + number)
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
            return ports
        except (OSError, OverflowError):
            continue


def _send(by: Callable[[int, int], None], pid: int, what: signal.Signals) -> None:
    try:
        by(pid, what)
    except ProcessLookupError:
        pass


def _wait(process: subprocess.Popen, family: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (process.poll() is None or any(map(_alive, family))) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to look does not."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
