"""EdgeGroupNormSilu against float64, the kernels' own source run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels_cuda.conftest import SMS
from tools.bench_cuda_cases_decoder import group_norm

#: B, C, N, groups: groups of less than a warp, of one batch and of several, channels of odd size, one group, many.
SHAPES = (
    (1, 32, 64, 8),
    (2, 64, 256, 32),
    (1, 8, 13, 2),
    (2, 6, 225, 3),
    (1, 4, 1, 2),
    (1, 12, 1000, 1),
    (2, 32, 24, 32),
    (1, 2, 5000, 2),
)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(run_case, shape, silu) -> None:
    run_case(group_norm(*shape, silu=silu))


@pytest.mark.parametrize("shape", [(1, 2, 8192, 1), (2, 4, 16384, 2), (1, 1, 9001, 1), (1, 8, 5000, 2)], ids=str)
def test_several_blocks_a_group(run_case, host_kernels, shape) -> None:
    case = group_norm(*shape, workspace=True, wave=4.0)
    launches = host_kernels("group_norm")("group_norm", *case.plan[1], SMS)
    assert [launch.name for launch in launches] == ["edge_group_norm_stats", "edge_group_norm_apply"]
    assert launches[0].grid[0] > 1
    run_case(case)


@pytest.mark.parametrize("workspace", [False, True], ids=["one", "parts"])
def test_a_mean_far_larger_than_the_deviation(run_case, workspace) -> None:
    """The sum of squares less the square of the sum would leave nothing of this variance in float32."""
    run_case(group_norm(1, 2, 16384, 1, mean=2000.0, workspace=workspace))


def test_a_constant_group_is_its_bias(run_case) -> None:
    case = group_norm(1, 4, 640, 2, silu=False)
    case.arguments[0][:] = 1.5
    case.outputs[3].value[:] = case.arguments[2].astype(np.float64)[:, None]
    run_case(case)


@pytest.mark.long
@pytest.mark.parametrize("workspace", [False, True], ids=["one", "parts"])
def test_the_largest_group_of_an_image_decoder(run_case, workspace) -> None:
    run_case(group_norm(1, 8, 256 * 256, 2, workspace=workspace, wave=3.0))


def test_shapes_that_no_kernel_takes(host_kernels) -> None:
    plan = host_kernels("group_norm")
    assert len(plan("group_norm", 1, 128, 32, 65536, 0, SMS)) == 1
    assert not plan("group_norm", 1, 10, 3, 64, 0, SMS), "groups that do not share evenly"
    assert not plan("group_norm", 1, 2, 1, 2**24, 0, SMS), "more numbers in a group than float32 counts"
