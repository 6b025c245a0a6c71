"""Moves the large blocks that a model's loading leaves in memory into huge pages (Linux 6.1 and later).

A decode step reads every weight once, so it is as fast as memory is, and that depends on where a process's 4 KiB pages
lie: a 4-bit model of 0.5B that was opened several times decoded with 62 to 67 tokens/s, and with 66 to 67 in huge
pages (Intel, two cores). The C library could be told to ask for them, but only before the process starts, and finding
them would then be part of loading: up to 2 s where memory is fragmented. Here a thread in the background does it,
a while behind the loading: moving holds back whoever maps memory, such as the next model that is opened.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from runtimes.host import read_text

_MADV_COLLAPSE = 25  # madvise(2)
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
#: Bytes of weights from which on it is worth a thread.
LEAST = 64 << 20
#: Bytes of one call, which holds back whoever maps memory meanwhile.
_STEP = 16 << 20
#: Seconds between the end of loading and the moving.
DELAY = 1.0

Block = tuple[int, int]


class HugePages:
    """Moves the private memory that is mapped until `loaded` into huge pages, where the system lets a process do so.

    Args:
        size: bytes of the weights that are to be loaded; nothing is done below `LEAST`.
    """

    def __init__(self, size: int) -> None:
        self._page = _page_bytes() if size >= LEAST else 0
        self._before = _blocks() if self._page else []
        self._timer: threading.Timer | None = None

    def loaded(self) -> None:
        """What is new by now is moved in a thread of its own, `DELAY` seconds later."""
        if self._page:
            self._timer = threading.Timer(DELAY, _collapse, (_without(_blocks(), self._before), self._page))
            self._timer.daemon = True
            self._timer.start()

    def wait(self) -> None:
        """Until it is done."""
        if self._timer is not None:
            self._timer.join()

    def cancel(self) -> None:
        """The memory is about to be given back: what was not begun is not done."""
        if self._timer is not None:
            self._timer.cancel()


def _page_bytes() -> int:
    """The size of a huge page; 0 where there is none, or where the administrator has switched them off."""
    if sys.platform != "linux" or "[never]" in (read_text(_SYSTEM / "enabled") or "[never]"):
        return 0
    size = read_text(_SYSTEM / "hpage_pmd_size") or ""
    return int(size) if size.isdigit() else 0


def _blocks() -> list[Block]:
    """[start, end) of every private writable mapping without a file, by address."""
    found = []
    for line in (read_text(Path("/proc/self/maps")) or "").splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        if permissions == "rw-p" and inode == "0" and "[stack" not in line:
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end))
    return found


def _without(blocks: Sequence[Block], others: Sequence[Block]) -> list[Block]:
    """What of ``blocks`` is in none of ``others``; both by address. The system joins neighbours of one kind."""
    left = []
    for start, end in blocks:
        for first, last in others:
            if first < end and last > start:
                if start < first:
                    left.append((start, first))
                start = max(start, last)
        if start < end:
            left.append((start, end))
    return left


def _collapse(blocks: Sequence[Block], page: int) -> None:
    """What cannot be moved, such as a block without contents or one that is gone by now, is left as it is."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in blocks:
        first, last = -(-start // page) * page, end // page * page
        for at in range(first, last, _STEP):
            madvise(at, min(_STEP, last - at), _MADV_COLLAPSE)
