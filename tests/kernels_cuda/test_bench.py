"""The benchmark as far as it goes without a GPU: its refusal, its cases' launches, and the cases themselves, small."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from tests.kernels_cuda.conftest import ROOT
from tools.bench_cuda_table import BENCH, OP_OF, Entry
from tools.cuda_kernels import Plans, build_plans

#: Multiprocessors of Orin Nano and AGX, Thor, 4090, H200, 5090.
DEVICES = (8, 16, 20, 128, 132, 170)
#: A launch's limits on every SM (CUDA guide, compute capabilities): threads, grid x, grid y, shared bytes.
THREADS, GRID_X, GRID_Y, SHARED = 1024, 2**31 - 1, 65535, 99 * 1024


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Plans:
    return Plans(build_plans(tmp_path_factory.mktemp("plans") / "plans.so"))


def check_launch(launch, names: list[str]) -> None:
    assert launch.name in names
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    assert 32 <= threads <= THREADS and threads % 32 == 0
    assert 1 <= launch.grid[0] <= GRID_X and 1 <= launch.grid[1] <= GRID_Y and 1 <= launch.grid[2] <= GRID_Y
    assert launch.shared_bytes <= SHARED


def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "tools.bench_cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("No CUDA kernel can run: torch ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("entry", BENCH, ids=lambda entry: f"{entry.small().plan[0]}-{entry.sizes}")
def test_small_case_on_the_cpu(run_case, entry: Entry) -> None:
    run_case(entry.small())


def test_linear_plans(plans, host_kernels) -> None:
    """All shapes up to those of 7B models; K stays below the shared memory's 12 thousand halves of four rows."""
    names = host_kernels("linear").names()
    rows, outputs, columns = (1, 2, 4, 5, 300, 4096), (8, 1024, 6144, 151936), (64, 896, 4864, 11008)
    for op, bits, scales, kind, sms in itertools.product(range(4), (4, 8), (0, 1), (0, 1), DEVICES):
        for M, N, K in itertools.product(rows, outputs, columns):
            for block in (16, 32, 128, -(-K // 32) * 32):
                (launch,) = plans("linear", op, bits, scales, M, N, K, block, kind, sms)
                check_launch(launch, names)
                assert launch.name.rsplit("_", 1)[1] == ("any" if kind else "gemv" if M <= 4 else "gemm")
                assert kind == 0 or launch.shared_bytes <= 48 * 1024


def test_head_plans(plans, host_kernels) -> None:
    names = host_kernels("head").names()
    for B, V, K, k, sms in itertools.product((1, 4, 9), (33, 151936), (896, 4096), (1, 64), DEVICES):
        (launch,) = plans("head", 4, 0, B, V, K, 32, k, sms)
        check_launch(launch, names)
        (launch,) = plans("merge_top", B, -(-V // 256), k, sms)
        check_launch(launch, names)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("linear", (0, 3, 0, 1, 64, 64, 32, 0, 16)),  # 3 bits
        ("linear", (4, 4, 0, 1, 64, 64, 32, 0, 16)),  # no such op
        ("linear", (3, 4, 0, 1, 63, 64, 32, 0, 16)),  # a gate without its up
        ("linear", (0, 4, 0, 1, 64, 64, 48, 0, 16)),  # a block that is no multiple of 32
        ("linear", (0, 4, 0, 0, 64, 64, 32, 0, 16)),  # no rows
        ("linear", (0, 8, 0, 1, 64, 65536, 65536, 0, 16)),  # columns that the reciprocal cannot divide
        ("head", (4, 0, 1, 1000, 64, 32, 65, 16)),  # k
        ("head", (4, 0, 4, 1000, 16384, 32, 5, 16)),  # x larger than the shared memory
        ("merge_top", (1, 4, 65, 16)),
    ],
)
def test_shapes_that_no_kernel_takes(plans, name, shape) -> None:
    assert plans(name, *shape) == []


@pytest.mark.long
@pytest.mark.parametrize("entry", BENCH, ids=lambda entry: f"{entry.small().plan[0]}-{entry.sizes}")
def test_full_case_has_launches(plans, host_kernels, entry: Entry) -> None:
    case = entry.full()
    names = host_kernels(OP_OF.get(case.plan[0], case.plan[0])).names()
    for sms in DEVICES:
        launches = plans(case.plan[0], *case.plan[1], sms)
        assert launches
        for launch in launches:
            check_launch(launch, names)
