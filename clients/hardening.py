"""The first thing that a process with keys asks of Linux: that nothing of its memory goes to a disk or to another process."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys

SET_DUMPABLE, SET_NAME = 4, 15  # of prctl(2)
log = logging.getLogger("veilora.node")


def closed() -> None:
    """No core dumps, and no other process of the same user looks in: no ptrace, no /proc/PID/mem. What is forked has it, too.

    A program that is started anew has it no more. On another system than Linux only core dumps are off, and the log says so.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux") or _prctl(SET_DUMPABLE, 0):
        log.warning("other processes of this user can look into this one: the system does not take PR_SET_DUMPABLE")


def named(name: str) -> None:
    """Let `ps` and `top` call this process so, where they ask for a thread's name; 15 letters of it."""
    if sys.platform.startswith("linux"):
        _prctl(SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, value: object) -> int:
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
