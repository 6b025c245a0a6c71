"""cuda_on_cpu.h: threads, warps and tensor cores compute what a GPU's do, and what would hang there is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.cuda_kernels import HostKernels, build_host, launch_of

PROBE = Path(__file__).parent / "probe" / "probe.cuh"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build_host(PROBE, tmp_path_factory.mktemp("probe") / "probe.so")


@pytest.fixture(scope="module")
def probe(library) -> HostKernels:
    return HostKernels(library)


def test_block_sums(probe) -> None:
    x = np.random.default_rng(0).integers(-9, 9, 500).astype(np.float32)
    y = np.zeros(2, np.float32)
    probe.launch(launch_of("probe_sum", [2], [256]), [x, y, 500])
    np.testing.assert_array_equal(y, [x[:256].sum(), x[256:].sum()])


def test_tensor_cores(probe) -> None:
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((rows, 16)).astype(np.float16) for rows in (16, 8))
    y = np.zeros((16, 8), np.float32)
    probe.launch(launch_of("probe_mma", [1], [32], 24 * 32), [a, b, y])
    # Products are exact; 16 additions in float32 round by 2^-24 of the running sum, at most the sum of magnitudes.
    limit = 16 * 2.0**-24 * np.abs(a).astype(float) @ np.abs(b).astype(float).T
    assert (np.abs(y - a.astype(float) @ b.astype(float).T) <= limit).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("probe_divergent", "deadlock: thread 0 waits at {at}:44; thread 40 has returned"),
        ("probe_unpaired", "deadlock: thread 0 waits at {at}:51; thread 32 waits at {at}:53"),
        ("probe_stray_lane", "a shuffle reads a lane that is not in the mask"),
    ],
)
def test_faults_end_the_program(library, kernel, message) -> None:
    script = (
        "import numpy, sys; from tools.cuda_kernels import HostKernels, launch_of\n"
        f"HostKernels(sys.argv[1]).launch(launch_of({kernel!r}, [1], [64]), [numpy.zeros(64, 'f')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)], cwd=PROBE.parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"{kernel}, block (0, 0, 0): {message.format(at=PROBE)}" in done.stderr


def test_halves_round_like_numpy(probe, library) -> None:
    """Every half widens exactly, and floats round to nearest even, subnormals, overflow and infinities included."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    random = np.random.default_rng(2).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        around = np.concatenate([np.nextafter(every.astype(np.float32), np.float32(to)) for to in (-np.inf, np.inf)])
    x = np.concatenate([every.astype(np.float32), random, around, np.float32([65519.996, 65520, 2**-25, 2**-24])])
    y = np.empty(len(x), np.float16)
    probe.launch(launch_of("probe_round", [1], [32]), [x, y, len(x)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(y.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(y[~numbers]).all()
