"""The memory-bandwidth roof of this machine, measured: what a decoding step could stream its weights at.

A buffer larger than the last-level cache is read (a maximum over it) and copied (read and written, so counted twice)
in as many threads as the run has; the faster of the two, best of several passes, is the roof. numpy releases the
interpreter lock in both. Weights that fit in the cache can be read faster than this roof: a share above 1 says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.host import last_level_cache_bytes, memory_bytes

Array = np.ndarray[Any, Any]
PASSES = 5
SMALLEST, LARGEST = 64 << 20, 1 << 30


@dataclass(frozen=True)
class Roof:
    """Bytes per second, how they were moved ("read" or "copy"), and the bytes of the buffer."""

    bytes_per_second: float
    method: str
    buffer_bytes: int


def buffer_bytes() -> int:
    """Four times the last-level cache, between 64 MiB and 1 GiB, and at most a sixteenth of the memory."""
    wanted = min(max(4 * (last_level_cache_bytes() or 0), SMALLEST), LARGEST)
    memory = memory_bytes()
    return min(wanted, memory // 16) if memory else wanted


def measure_roof(threads: int, size: int | None = None) -> Roof:
    """Takes about a second. `size` is the buffer in bytes (default: `buffer_bytes()`)."""
    size = (size or buffer_bytes()) // 8 * 8
    source, target = np.ones(size // 8, np.int64), np.zeros(size // 8, np.int64)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def read(part: tuple[Array, Array]) -> None:
        part[0].max()

    def copy(part: tuple[Array, Array]) -> None:
        np.copyto(part[1], part[0])

    with ThreadPoolExecutor(threads) as pool:
        found = {"read": size / _fastest(pool, read, parts), "copy": 2 * size / _fastest(pool, copy, parts)}
    method = max(found, key=lambda name: found[name])
    return Roof(found[method], method, size)


def _fastest(pool: ThreadPoolExecutor, work: Callable[[tuple[Array, Array]], None], parts: list[Any]) -> float:
    """Seconds of the fastest of PASSES passes over all parts at once."""
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        list(pool.map(work, parts))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
