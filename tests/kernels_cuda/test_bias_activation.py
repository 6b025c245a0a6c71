"""EdgeBiasActivation against float64, the kernel's own source run on the CPU."""

from __future__ import annotations

import pytest

from tests.kernels_cuda.conftest import SMS
from tools.bench_cuda_cases_decoder import bias_activation

SHAPES = ((1, 3, 64), (2, 5, 40), (1, 7, 1000), (2, 3, 13), (1, 1, 1), (1, 300, 8), (2, 4, 1025))


@pytest.mark.parametrize("activation", ["silu", "snake"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(run_case, shape, activation) -> None:
    run_case(bias_activation(*shape, activation))


@pytest.mark.parametrize("activation", ["silu", "snake"])
def test_large_values(run_case, activation) -> None:
    """A sine many periods out is as good as one near zero, and exp(-z) may overflow."""
    run_case(bias_activation(1, 4, 4096, activation, size=8000.0))


def test_shapes_that_no_kernel_takes(host_kernels) -> None:
    plan = host_kernels("bias_activation")
    assert plan("bias_activation", 1, 2, 3, 1, SMS)
    assert not plan("bias_activation", 1, 2, 3, 3, SMS), "no such activation"
    assert not plan("bias_activation", 0, 2, 3, 1, SMS)
    assert not plan("bias_activation", 64, 4096, 65537, 1, SMS), "more numbers than 31 bits count"
