"""EdgeLinear and its fused forms against float64, the kernels' own source run on the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tools.bench_cuda_cases import OPS, linear

#: (N, K, bits, block): tails of K in blocks and in loads, N that is no multiple of a tile, one block for a whole row.
WEIGHTS = (
    (48, 256, 4, 32),
    (24, 192, 4, 32),
    (34, 192, 4, 64),
    (20, 160, 4, 16),
    (18, 80, 4, 16),
    (22, 200, 4, 128),
    (16, 72, 4, 96),
    (40, 192, 8, 256),
    (26, 208, 8, 16),
    (34, 320, 8, 32),
)
ROWS = (1, 2, 4, 5, 17)


def id_of(weight: tuple[int, ...]) -> str:
    return "n{}-k{}-w{}-b{}".format(*weight)


@pytest.mark.parametrize("weight", WEIGHTS, ids=id_of)
@pytest.mark.parametrize("op", OPS)
def test_against_float64(run_case, op, weight) -> None:
    N, K, bits, block = weight
    for seed, (M, scales) in enumerate(itertools.product(ROWS, (np.float16, np.float32))):
        run_case(linear(op, M, N, K, bits=bits, block=block, scales=scales, symmetric=seed % 3 == 0, seed=seed))


@pytest.mark.parametrize("weight", WEIGHTS[::3], ids=id_of)
@pytest.mark.parametrize("M", [1, 3, 6])
@pytest.mark.parametrize("op", OPS)
def test_kernel_that_branches_on_rows(run_case, op, M, weight) -> None:
    N, K, bits, block = weight
    run_case(linear(op, M, N, K, bits=bits, block=block, any_kernel=True, seed=M))


@pytest.mark.parametrize("sms", [1, 4, 132])
def test_every_split_of_the_work(run_case, sms) -> None:
    """From one SM, where blocks stride over tiles, to many, where up to 16 warps share a tile."""
    for op in OPS:
        run_case(linear(op, 3, 166, 520, seed=sms), sms=sms)
        run_case(linear(op, 70, 166, 136, bits=8, seed=sms), sms=sms)
