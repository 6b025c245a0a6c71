"""EdgeHead and EdgeMergeTop: logits against float64, lists against the logits themselves, to the last tie."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.kernels_cuda.conftest import SMS
from tools.bench_cuda_cases import Case, check_top, head, merge_top

#: (B, V, K, first, end, k, bits, block): odd vocabularies, ranges that begin and end inside of tiles, empty ones, more
#: asked for than there are.
HEADS = (
    (1, 700, 128, 0, 700, 5, 4, 32),
    (2, 515, 192, 250, 513, 64, 4, 64),
    (1, 1024, 80, 300, 301, 3, 4, 16),
    (3, 300, 192, 256, 300, 50, 8, 256),
    (5, 521, 96, 17, 200, 1, 8, 32),
    (1, 600, 64, 40, 40, 4, 4, 32),
    (1, 33, 72, 0, 33, 64, 4, 128),
)


def run(host_kernels, case: Case) -> list:
    kernels, (name, fields) = host_kernels("head"), case.plan
    (launch,) = kernels(name, *fields, SMS)
    arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in case.arguments]
    kernels.launch(launch, arguments)
    case.check(arguments)
    return arguments


@pytest.mark.parametrize("scales", [np.float16, np.float32])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_head(host_kernels, shape, scales) -> None:
    B, V, K, first, end, k, bits, block = shape
    case = head(B, V, K, first=first, end=end, k=k, bits=bits, block=block, scales=scales)
    _, values, ids = run(host_kernels, case)[6:9]
    without = run(host_kernels, head(B, V, K, first=first, end=end, k=k, bits=bits, block=block, scales=scales,
                                     with_logits=False))  # fmt: skip
    np.testing.assert_array_equal(without[7], values)
    np.testing.assert_array_equal(without[8], ids)


def test_equal_logits_come_by_id(host_kernels) -> None:
    """All codes at their zero point but for a few equal rows: nearly all logits are 0."""
    case = head(2, 600, 64, k=20, block=32, symmetric=True)
    codes = case.arguments[2]
    codes[:] = np.int32(-0x77777778)  # eights
    codes[[5, 77, 300, 301, 599]] = np.int32(-0x66666667)  # nines
    case.arguments[3][:] = 0.25
    kernels = host_kernels("head")
    (launch,) = kernels(case.plan[0], *case.plan[1], SMS)
    kernels.launch(launch, case.arguments)
    logits, values, ids = case.arguments[6:9]
    check_top(logits, values, ids)
    assert np.unique(logits[0]).size == 2


def test_rows_outside_are_not_read(host_kernels) -> None:
    """Other rows hold scales that are not numbers: reading one would show."""
    case = head(1, 768, 64, first=256, end=512, k=4)
    arguments = list(case.arguments)
    arguments[3] = arguments[3].copy()
    arguments[3][np.r_[0:256, 512:768]] = np.nan
    changed = dataclasses.replace(case, arguments=tuple(arguments))
    for got, expected in zip(run(host_kernels, changed)[6:9], run(host_kernels, case)[6:9], strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize(("B", "tiles", "k"), [(1, 1, 1), (2, 7, 64), (3, 40, 33), (1, 600, 5), (1, 300, 64)])
def test_merge(host_kernels, B, tiles, k, levels) -> None:
    run(host_kernels, merge_top(B, tiles, k, levels=levels, seed=tiles))


def test_merge_of_nothing(host_kernels) -> None:
    run(host_kernels, merge_top(1, 9, 8, missing=1.0))
    case = merge_top(1, 3, 4)
    case.arguments[0][:], case.arguments[1][:] = -np.inf, -1
    kernels = host_kernels("head")
    kernels.launch(kernels(case.plan[0], *case.plan[1], SMS)[0], case.arguments)
    assert np.isneginf(case.arguments[2]).all() and (case.arguments[3] == -1).all()
