"""Freed memory kept for the next step, where the C library would hand it back to the system.

glibc gives every freed block above 32 MB straight back, and the kernel maps and clears its pages anew when the next batch
asks for them, which on a virtual machine can cost more than the arithmetic. The process stays as large as its largest batch.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the numbers of malloc.h
LARGEST = 2**30  # bytes: single blocks above it, a whole dataset perhaps, are still given back


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of this process. Returns whether there was a glibc to tell."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    # in this order: an older glibc refuses the first, and the second alone makes large blocks dearer
    return bool(library.mallopt(MMAP_THRESHOLD, LARGEST)) and bool(library.mallopt(TRIM_THRESHOLD, -1))
