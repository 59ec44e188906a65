"""Memory of a fresh process: what a piece of work adds at its peak. torch's tensors count, which tracemalloc does not see."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any, Callable

STATUS = Path("/proc/self/status")  # Linux; ru_maxrss would begin at the parent's peak


def apart(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def growth(work: Callable[[], object]) -> tuple[Any, int]:
    """What ``work`` returns, and the bytes by which this process outgrew at its peak what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _field("VmRSS")
    result = work()
    return result, max(0, _field("VmHWM") - before)


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
