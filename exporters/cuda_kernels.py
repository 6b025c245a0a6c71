"""Finds the CUDA kernels (kernels/cuda) and compiles them to PTX: by nvcc, or by NVRTC for CUDA 12.

A PTX of one SM holds every op's entry points. It is the same bytes on every build: nvcc and NVRTC are given one source
by a fixed name, and the lines in which they name themselves (and so the build) stay as they are for one compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from exporters.errors import ExportError

SOURCES = Path(__file__).parent.parent / "kernels" / "cuda"
#: The targets of issue and profiles: Orin, 4090, H100/H200, Thor, 5090.
SMS = ("sm_87", "sm_89", "sm_90", "sm_110", "sm_120")
#: Flags of every build for a GPU; --use_fast_math is not among them: denormals and divisions stay exact.
FLAGS = ("-std=c++17", "-default-device")
#: Where NVIDIA's own installer puts CUDA.
TOOLKIT = Path("/usr/local/cuda")
_COMPILER = "Install the compilers of the extra `cuda`, or correct the source that it names"
NVRTC_PACKAGES = ("nvidia-cuda-nvrtc-cu12==12.6.85", "nvidia-cuda-runtime-cu12==12.6.77")
NVCC_PACKAGES = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-crt==13.0.88"),
    *("nvidia-cuda-runtime==13.0.88", "nvidia-cuda-cccl==13.0.85"),
)
#: What an NVRTC 12.x can make; newer SMs need the nvcc of CUDA 13.
NVRTC_SMS = ("sm_87", "sm_89", "sm_90")


class CompilerMissing(ExportError):
    """No compiler here makes PTX for the SM and CUDA version asked for."""


class KernelsRefused(ExportError):
    """The compiler was found and refused the kernels; its words are in the message."""


def ops() -> dict[str, Path]:
    """op -> its `<op>.cuh`, every folder of kernels/cuda that has one."""
    return {path.parent.name: path for path in sorted(SOURCES.glob("*/*.cuh")) if path.stem == path.parent.name}


def compile_ptx(sm: str, cuda_version: str, names: Collection[str] | None = None, only: Collection[str] = ()) -> bytes:
    """PTX for ``sm`` ("sm_87"), loadable by a driver of CUDA ``cuda_version`` ("12.6") or newer.

    PTX is forward compatible only: CUDA 12.x asks for NVRTC 12.6 (PTX ISA 8.5), CUDA 13 and newer for nvcc 13.0.

    Args:
        names: the ops that are wanted, None for all.
        only: flags of the entry points that are wanted of them (kernels/cuda/common/select.h), empty for all.

    Raises:
        CompilerMissing: with the compiler's name and where it comes from.
        KernelsRefused: the compiler's own message.
    """
    selected = [f"#define EDGE_{token} 1\n" for token in sorted({"ONLY", *only})] if only else []
    held = ops()
    headers = [held[name].relative_to(SOURCES).as_posix() for name in (held if names is None else names)]
    return compile_source("".join([*selected, *(f'#include "{header}"\n' for header in headers)]), sm, cuda_version)


def compile_source(source: str, sm: str, cuda_version: str) -> bytes:
    """PTX of one source text, which includes headers relative to kernels/cuda; as `compile_ptx`."""
    major = int(cuda_version.split(".")[0])
    if major >= 13:
        return nvcc_ptx(source, sm)
    if sm not in NVRTC_SMS:
        raise CompilerMissing(
            f"no compiler of CUDA {cuda_version} knows {sm}",
            where="kernels/cuda",
            way_out=f"{sm} needs CUDA 13 on the device; the profile's cuda is {cuda_version}",
        )
    return nvrtc_ptx(source, sm)


# --- nvcc -----------------------------------------------------------------------------------------------------------
def find_nvcc() -> Path:
    """nvcc of CUDA 13.

    Raises:
        CompilerMissing: there is none.
    """
    wheel = _wheel_folder("cu13", "bin", "nvcc")
    for place in (shutil.which("nvcc"), TOOLKIT / "bin" / "nvcc", wheel and wheel / "nvcc"):
        if place and Path(place).exists():
            return Path(place)
    raise CompilerMissing(
        "no nvcc, which makes the CUDA kernels' PTX",
        where="kernels/cuda",
        way_out=f"Put the nvcc of a CUDA 13 toolkit on PATH, or run `pip install {' '.join(NVCC_PACKAGES)}`",
    )


def nvcc_ptx(source: str, sm: str) -> bytes:
    """PTX by nvcc: for ``sm`` and, by the driver's compiler, everything after it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "edge.cu").write_text(source)
        # Run in the folder, so that no path of this build enters the PTX.
        command = [str(find_nvcc()), "-std=c++17", "-ptx", f"-arch={sm.replace('sm', 'compute')}", f"-I{SOURCES}",
                   "edge.cu", "-o", "edge.ptx"]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelsRefused(done.stderr.strip() or done.stdout.strip(), where=f"nvcc {sm}", way_out=_COMPILER)
        return (Path(folder) / "edge.ptx").read_bytes()


def cubin_report(source: str, sm: str) -> dict[str, dict[str, int]]:
    """entry -> {registers, spills, stack, shared} as ptxas reports them (bytes, registers a thread).

    Raises:
        CompilerMissing, KernelsRefused: as `compile_ptx`.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "edge.cu").write_text(source)
        command = [str(find_nvcc()), "-std=c++17", "-cubin", f"-arch={sm}", "-Xptxas", "-v", f"-I{SOURCES}",
                   "-Werror", "all-warnings", "edge.cu", "-o", "edge.cubin"]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelsRefused(done.stderr.strip() or done.stdout.strip(), where=f"nvcc {sm}", way_out=_COMPILER)
    return dict(_entries(done.stderr + done.stdout))


def _entries(report: str) -> Iterator[tuple[str, dict[str, int]]]:
    parts = re.split(r"Compiling entry function '(\w+)'", report)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", text))
        used = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        yield (
            name,
            {
                "registers": int(used[1]) if used else 0,
                "spills": stores + loads,
                "stack": stack,
                "shared": int(shared[1]) if shared else 0,
            },
        )


# --- NVRTC ----------------------------------------------------------------------------------------------------------
def _wheel_folder(package: str, inside: str, pattern: str) -> Path | None:
    """The folder ``nvidia/<package>/<inside>`` of an installed wheel that holds ``pattern``.

    The folder that EDGE_CUDA_WHEELS names (`pip install --target`) is looked at before the environment.
    """
    roots = [Path(os.environ["EDGE_CUDA_WHEELS"]) / "nvidia"] if "EDGE_CUDA_WHEELS" in os.environ else []
    found = importlib.util.find_spec("nvidia")
    roots += [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    for root in roots:
        folder = root / package / inside
        if any(folder.glob(pattern)):
            return folder
    return None


@functools.cache
def _nvrtc() -> tuple[ctypes.CDLL, Path]:
    library = _wheel_folder("cuda_nvrtc", "lib", "libnvrtc.so.12")
    headers = _wheel_folder("cuda_runtime", "include", "cuda_fp16.h")
    if library is None or headers is None:
        raise CompilerMissing(
            "no NVRTC 12.6 with its headers, which makes the kernels' PTX for CUDA 12",
            where="kernels/cuda",
            way_out=f"Run `pip install {' '.join(NVRTC_PACKAGES)}`",
        )
    # Loaded by hand, since NVRTC looks it up by name only.
    for builtins in library.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library / "libnvrtc.so.12")), headers


def nvrtc_ptx(source: str, sm: str) -> bytes:
    """PTX by NVRTC 12.6: ISA 8.5, which drivers of CUDA 12.6 (JetPack 6) take."""
    library, headers = _nvrtc()
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={sm.replace('sm', 'compute')}", *FLAGS, f"-I{SOURCES}", f"-I{headers}"]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"edge.cu", 0, None, None)
    if created:
        raise KernelsRefused(f"nvrtcCreateProgram failed with {created}", where=f"NVRTC {sm}", way_out=_COMPILER)
    try:
        if library.nvrtcCompileProgram(program, len(options), words):
            raise KernelsRefused(_text(library, program, "ProgramLog").decode(), where=f"NVRTC {sm}", way_out=_COMPILER)
        return _text(library, program, "PTX").rstrip(b"\0")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.raw[: size.value]
