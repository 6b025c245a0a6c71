"""EdgeCodebook against float64, the kernel's own source run on the CPU."""

from __future__ import annotations

import pytest

from tests.kernels_cuda.conftest import SMS
from tools.bench_cuda_cases_decoder import codebook

#: B, Q, T, C, size: full and partial tiles both ways, rows of tables and of the output that are no multiple of 8.
SHAPES = (
    (1, 1, 64, 64, 16),
    (2, 1, 256, 8, 100),
    (1, 8, 75, 128, 32),
    (2, 4, 72, 96, 20),
    (1, 3, 50, 4, 7),
    (2, 5, 33, 70, 9),
    (1, 32, 13, 256, 11),
    (1, 2, 1, 1, 1),
    (1, 1, 200, 13, 50),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(run_case, shape) -> None:
    run_case(codebook(*shape))


@pytest.mark.parametrize("channels", [16, 12])
def test_codes_outside_of_the_table_give_nan(run_case, channels) -> None:
    """Sums of two halves of one table entry each are exact, so that the rest is compared as it is."""
    run_case(codebook(2, 1, 40, channels, 9, outside=True))


def test_shapes_that_no_kernel_takes(host_kernels) -> None:
    plan = host_kernels("codebook")
    assert plan("codebook", 1, 2, 3, 4, 5, SMS)
    for position in range(5):
        shape = [1, 2, 3, 4, 5]
        shape[position] = 0
        assert not plan("codebook", *shape, SMS)
