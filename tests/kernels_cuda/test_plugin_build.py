"""The libraries are built here and for 64-bit Arm, and what a machine lacks is said by name."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from exporters.plugin_sources import plugin_sources
from tests.kernels_cuda import test_plugin_ops as nodes
from tests.kernels_cuda.plugin_library import CUDA, NO_DRIVER, NO_KERNELS, UNITS, Library, Refused, build
from tools.cuda_kernels import SOURCES

CROSS = "aarch64-linux-gnu-g++"
HEADER = "NvInferRuntime.h"
PRINTS_OPS = """
#include "library/edge_kernels.h"
#include <cstdio>
int main() {
    for (int i = 0; edge_op(i); ++i) std::puts(edge_op(i));
    std::puts(edge_message());
}
"""
MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of ELF


def machine_of(library: Path) -> str:
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    return MACHINES[struct.unpack_from("<H", header, 18)[0]]


def cmake(sources: Path, folder: Path, *options: str, target: str = "edge_kernels") -> str:
    """Configures and builds a target; gives what CMake said."""
    said = subprocess.run(["cmake", "-S", sources, "-B", folder, *options], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    done = subprocess.run(["cmake", "--build", folder, "--target", target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "warning:" not in done.stdout + done.stderr
    return said.stdout


def has_tensorrt() -> bool:
    roots = {os.environ.get("TensorRT_ROOT", "/usr"), "/usr", "/usr/local/tensorrt", "/opt/tensorrt"}  # noqa: SIM112
    return any(any(Path(root).glob(f"include/**/{HEADER}")) for root in roots)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return Library(build(tmp_path_factory.mktemp("library")))


@pytest.mark.long
def test_cmake_builds_what_it_can_and_names_what_it_skips(tmp_path) -> None:
    said = cmake(SOURCES, tmp_path)
    library = ctypes.CDLL(str(tmp_path / "libedge_kernels.so"))
    library.edge_op.restype = ctypes.c_char_p
    assert library.edge_op(0) == b"EdgeLinear"
    if not has_tensorrt():
        assert f"edge_plugins is skipped: no {HEADER} of TensorRT; give -DTensorRT_ROOT=..." in said
        return
    assert "edge_plugins: TensorRT's headers of " in said
    cmake(SOURCES, tmp_path, target="edge_plugins")
    plugins = ctypes.CDLL(str(tmp_path / "libedge_plugins.so"))
    count = ctypes.c_int32()
    plugins.getCreators.restype = ctypes.c_void_p
    assert plugins.getCreators(ctypes.byref(count))
    assert count.value == len(nodes.OPS)


@pytest.mark.long
def test_what_a_bundle_takes_along_is_enough(tmp_path) -> None:
    """The sources alone, in two places: they build, and to the same bytes."""
    made = []
    for place in ("one", "another/place"):
        sources = tmp_path / place / "plugin"
        for name, path in plugin_sources().items():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, sources / name)
        said = cmake(sources, tmp_path / place / "build")
        assert "edge_ptx is skipped: the kernels' sources are not here" in said
        made.append((tmp_path / place / "build" / "libedge_kernels.so").read_bytes())
    assert made[0] == made[1]
    assert not [name for name in plugin_sources() if name.endswith((".cuh", ".py"))]
    assert "tensorrt/plugin.cpp" in plugin_sources()


@pytest.mark.long
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")
def test_cross_build_for_64_bit_arm(tmp_path) -> None:
    said = cmake(SOURCES, tmp_path / "preset", "--preset", "aarch64")
    assert machine_of(tmp_path / "preset" / "libedge_kernels.so") == "aarch64"
    if has_tensorrt():
        assert "edge_plugins is skipped" not in said
        cmake(SOURCES, tmp_path / "preset", "--preset", "aarch64", target="edge_plugins")
        assert machine_of(tmp_path / "preset" / "libedge_plugins.so") == "aarch64"


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which("qemu-aarch64") is None, reason="no cross-compiler or no qemu-aarch64"
)
def test_the_arm_library_reads_its_table(tmp_path) -> None:
    main = tmp_path / "main.cpp"
    main.write_text(PRINTS_OPS)
    program = tmp_path / "main"
    command = [CROSS, "-std=c++17", "-static", f"-I{SOURCES}", str(main), *map(str, UNITS), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run(["qemu-aarch64", str(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(nodes.OPS)


def test_without_a_driver_a_run_says_so(library) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
        codes, message = (NO_DRIVER, CUDA), "no device that works|this thread has no CUDA context"
    except OSError:
        codes, message = (NO_DRIVER,), r"^the CUDA driver cannot be loaded: libcuda\.so\.1"
    op, attributes, inputs, outputs = nodes.CASES[0]
    with pytest.raises(Refused, match=message) as refusal:
        library.run(op, attributes, inputs, outputs)
    assert refusal.value.code in codes


def test_outputs_of_another_shape_are_refused_before_the_driver_is_asked(library) -> None:
    op, attributes, inputs, _ = nodes.CASES[0]
    with pytest.raises(Refused, match=r"^EdgeLinear, output y: is float16 \[1, 1, 63\], must be float16 \[1, 1, 64\]$"):
        library.run(op, attributes, inputs, [("f16", (1, 1, 63))])
    with pytest.raises(Refused, match=r"^EdgeLinear: has 1 outputs, was given 2$"):
        library.run(op, attributes, inputs, [("f16", (1, 1, 64))] * 2)


def test_files_that_hold_no_kernels_are_refused(library, tmp_path) -> None:
    for name, data in (("missing.ptx", None), ("empty.ptx", b""), ("engine.ptx", b"\0\1ptrt")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match=f"{name}: is not there, or not a PTX file with kernels") as refusal:
            library.set_kernels(tmp_path / name)
        assert refusal.value.code == NO_KERNELS
    (tmp_path / "edge.ptx").write_text(".version 8.5\n.visible .entry edge_linear()\n{\nret;\n}\n")
    library.set_kernels(tmp_path / "edge.ptx")
