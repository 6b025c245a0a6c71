"""Cutting prompts into runs of compiled lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.buckets import History, runs

BUCKETS = (1, 4, 16, 64)


@given(
    st.integers(0, 300), st.integers(1, 300), st.sets(st.integers(2, 128), max_size=5).map(lambda s: sorted({1, *s}))
)
def test_every_token_is_run_in_order(position: int, length: int, buckets: list[int]) -> None:
    reached = position
    for first, size in runs(position, length, buckets):
        assert size in buckets
        assert 0 <= first <= reached < first + size  # no gap, nothing before the sequence, always further
        reached = first + size
    assert reached == position + length


@pytest.mark.parametrize(
    ("position", "length", "expected"),
    [
        (0, 1, [(0, 1)]),
        (0, 64, [(0, 64)]),
        (0, 100, [(0, 64), (36, 64)]),
        (0, 17, [(0, 16), (16, 1)]),
        (10, 3, [(9, 4)]),
        (0, 3, [(0, 1), (1, 1), (2, 1)]),
        (500, 5, [(489, 16)]),
    ],
)
def test_runs(position: int, length: int, expected: list[tuple[int, int]]) -> None:
    assert list(runs(position, length, BUCKETS)) == expected


def test_history_gives_back_the_tokens_of_an_earlier_call() -> None:
    history = History(32)
    for _ in history.runs(np.arange(10, dtype=np.int32)[None], 0, BUCKETS):
        pass
    [(ids, last)] = history.runs(np.array([[10, 11, 12]], np.int32), 10, BUCKETS)
    np.testing.assert_array_equal(ids, [[9, 10, 11, 12]])
    assert last == 12
