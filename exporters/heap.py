"""Has the C library give large blocks back to the system when they are freed.

glibc keeps freed blocks of up to 32 MB for the next request of that size. A build reads matrices of all sizes one after
another, which leaves a heap of holes: with 0.5B, 1.3 GB where 0.5 GB is in use.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
#: Blocks from this size on are mappings of their own.
LARGE = 1 << 20


def return_large_blocks() -> None:
    """For the whole process, as a command sets it at its start; nothing where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
