"""Every op compiles for every SM without spills, and for CUDA 12.6; PTX is the same twice and names no path."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from exporters import cuda_kernels
from exporters.cuda_kernels import NVRTC_SMS, SMS, SOURCES, CompilerMissing, KernelsRefused, ops
from tests.kernels_cuda.conftest import ROOT


def source_of(op: str) -> str:
    return f'#include "{op}/{op}.cuh"\n'


def with_compiler(build, *arguments):
    """The result, or a skip where there truly is no compiler."""
    try:
        return build(*arguments)
    except CompilerMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.long
@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("op", ops())
def test_no_spills(op, sm, host_kernels, record_property) -> None:
    """ptxas reports neither spills nor a stack frame, and the GPU build has the entry points that the CPU's has."""
    report = with_compiler(cuda_kernels.cubin_report, source_of(op), sm)
    record_property("registers", {name: entry["registers"] for name, entry in report.items()})
    assert {name: entry for name, entry in report.items() if entry["spills"] or entry["stack"]} == {}
    assert sorted(report) == sorted(host_kernels(op).names())


@pytest.mark.long
@pytest.mark.parametrize("sm", NVRTC_SMS)
def test_nvrtc_for_cuda_12(sm, host_kernels) -> None:
    text = with_compiler(cuda_kernels.compile_ptx, sm, "12.6").decode()
    check_ptx(text, sm, host_kernels)
    version = re.search(r"^\.version (\d+)\.(\d+)", text, re.M)
    assert version and (int(version[1]), int(version[2])) <= (8, 5)


@pytest.mark.long
@pytest.mark.parametrize("sm", SMS)
def test_nvcc_for_cuda_13(sm, host_kernels) -> None:
    check_ptx(with_compiler(cuda_kernels.compile_ptx, sm, "13.0").decode(), sm, host_kernels)


def check_ptx(text: str, sm: str, host_kernels) -> None:
    assert re.search(rf"^\.target {sm}$", text, re.M)
    assert sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == sorted(
        name for op in ops() for name in host_kernels(op).names()
    )
    assert str(SOURCES) not in text and "/tmp" not in text


@pytest.mark.parametrize("version", ["12.6", "13.0"])
def test_the_same_ptx_twice(version) -> None:
    source = '#include "common/device.cuh"\nEDGE_KERNEL(64) void one(float* x) { *x = edge::warp_sum(1); }\n'
    first = with_compiler(cuda_kernels.compile_source, source, "sm_87", version)
    assert first == cuda_kernels.compile_source(source, "sm_87", version)


@pytest.mark.parametrize("version", ["12.6", "13.0"])
def test_a_refusal_has_the_compilers_words(version) -> None:
    with pytest.raises(KernelsRefused, match=r"not_there.*undefined"):
        with_compiler(cuda_kernels.compile_source, "__global__ void one() { not_there(); }\n", "sm_87", version)


def test_a_missing_compiler_names_its_package(tmp_path) -> None:
    script = (
        "from pathlib import Path; from exporters import cuda_kernels as c\n"
        "c._wheel_folder = lambda *a: None; c.shutil.which = lambda name: None; c.TOOLKIT = Path('/nowhere')\n"
        "for version in ('12.6', '13.0'):\n"
        "    try: c.compile_ptx('sm_87', version)\n"
        "    except c.CompilerMissing as missing: print(missing)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for package in ("nvidia-cuda-nvrtc-cu12==12.6.85", "nvidia-cuda-nvcc==13.0.88"):
        assert package in done.stdout


def test_an_sm_that_cuda_12_does_not_know() -> None:
    with pytest.raises(CompilerMissing, match=r"sm_110.*CUDA 13"):
        cuda_kernels.compile_ptx("sm_110", "12.6")


def test_every_op_has_a_plan_and_is_told_of() -> None:
    text = (SOURCES / "README.md").read_text()
    for op, path in ops().items():
        assert (path.parent / "plan.h").exists(), op
        assert f"`{op}" in text, f"kernels/cuda/README.md says nothing of {op}"
