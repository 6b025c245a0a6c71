"""Prompts of any length on graphs compiled for a few fixed ones.

A prompt is cut into runs of the compiled lengths. Where its end does not fill one, the run starts earlier, on tokens
that the cache already holds: computing them again writes the same keys and values, and costs one run instead of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.session import Array


def runs(position: int, length: int, buckets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first position, size) of the runs that append ``length`` tokens to ``position`` held ones.

    Args:
        buckets: the compiled lengths, 1 among them.
    """
    sizes = sorted(buckets)
    end = position + length
    while position < end:
        left = end - position
        # The smallest length that takes all that is left and, where it is longer, begins no earlier than the sequence.
        size = next((size for size in sizes if left <= size <= end), None)
        if size is None:
            size = max(size for size in sizes if size <= left)
            yield position, size
        else:
            yield end - size, size
            return
        position += size


class History:
    """The tokens that the cache holds, for runs that begin on some of them: int32 [capacity]."""

    def __init__(self, capacity: int) -> None:
        self._ids = np.zeros(capacity, np.int32)

    def runs(self, ids: Array, position: int, buckets: Sequence[int]) -> Iterator[tuple[Array, int]]:
        """Notes ``ids`` [1, S] as following ``position`` tokens; (ids [1, size], position of the newest of them)."""
        end = position + ids.shape[1]
        self._ids[position:end] = ids[0]
        for first, size in runs(position, ids.shape[1], buckets):
            yield self._ids[None, first : first + size], first + size - 1
