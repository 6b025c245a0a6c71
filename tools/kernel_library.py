"""Builds kernels/cpu for one instruction set and calls its kernels with NumPy arrays, here or in an emulator."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "kernels" / "cpu"
SHIM = Path(__file__).with_name("kernel_shim.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels.

    Attributes:
        flags: what chooses the instruction set.
        needs: flags of /proc/cpuinfo that a CPU must have to run it here.
        compiler: the C++ compiler.
        emulator: what runs programs of it where the CPU cannot.
    """

    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    compiler: str = "g++"
    emulator: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_ARM = {"compiler": "aarch64-linux-gnu-g++", "emulator": ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")}

VARIANTS: Mapping[str, Variant] = {
    "avx2": Variant(_AVX2, frozenset({"avx2", "fma", "f16c"})),
    "avx2-vnni": Variant((*_AVX2, "-mavxvnni"), frozenset({"avx2", "fma", "f16c", "avx_vnni"})),
    "avx512-vnni": Variant(_AVX512, frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})),
    "neon": Variant(("-march=armv8-a",), **_ARM),
    "neon-dotprod": Variant(("-march=armv8.2-a+dotprod",), **_ARM),
    "neon-i8mm": Variant(("-march=armv8.6-a+i8mm",), **_ARM),
}  # fmt: skip


def runs_here(variant: Variant) -> bool:
    """Whether this machine runs the variant, itself or by its emulator."""
    if variant.emulator:
        return all(shutil.which(name) for name in (variant.compiler, variant.emulator[0]))
    cpu = Path("/proc/cpuinfo")
    there = set(cpu.read_text().split()) if cpu.exists() else set()
    return variant.needs <= there and shutil.which(variant.compiler) is not None


def build(variant: Variant, folder: Path, *, program: bool = False, extra: Sequence[str] = ()) -> Path:
    """Compiles the kernels and the shim into a shared library, or a program, in ``folder``; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler refused, with its words on standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-fPIC", *WARNINGS, *variant.flags, *extra, f"-I{SOURCES}"]
    flags += ["-DEDGE_PROGRAM"] if program else []
    objects = []
    for source in (*sorted(SOURCES.glob("*.cpp")), SHIM):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([variant.compiler, *flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    target = folder / ("kernels" if program else "kernels.so")
    link = [*extra, *([] if program else ["-shared"]), *map(str, objects), "-o", str(target)]
    subprocess.run([variant.compiler, *link], check=True)
    return target


@dataclass(frozen=True)
class Call:
    """One kernel's arguments in the order of the shim: arrays (None is null), integers and floats."""

    name: str
    buffers: Sequence[Array | None]
    ints: Sequence[int] = ()
    floats: Sequence[float] = field(default=())


class Library:
    """A shared library of kernels, called in this process."""

    def __init__(self, path: Path) -> None:
        self._call = ctypes.CDLL(str(path)).edge_call

    def prepare(self, call: Call, task: int = 0, tasks: int = 1):
        """A function of no arguments that makes the call; the arrays must stay as they are."""
        pointers = (ctypes.c_void_p * len(call.buffers))(*(None if b is None else b.ctypes.data for b in call.buffers))
        ints = (ctypes.c_int64 * len(call.ints))(*map(int, call.ints))
        floats = (ctypes.c_float * len(call.floats))(*call.floats)
        arguments = (call.name.encode(), pointers, ints, floats, task, tasks)

        def run(keep: Call = call) -> None:
            if self._call(*arguments):
                raise ValueError(f"no kernel {keep.name!r}")

        return run

    def __call__(self, call: Call, tasks: int = 1) -> None:
        """Runs all tasks, one after the other; results are in the call's arrays."""
        for task in range(tasks):
            self.prepare(call, task, tasks)()


class Program:
    """A program of kernels, run by ``emulator`` for each call."""

    def __init__(self, path: Path, emulator: Sequence[str] = ()) -> None:
        self._command = [*emulator, str(path)]
        self._file = path.with_suffix(f".{os.getpid()}.call")

    def __call__(self, call: Call, tasks: int = 1) -> None:
        """Runs all tasks, one after the other; results are copied into the call's arrays."""
        lists = (
            np.frombuffer(call.name.encode(), np.uint8),
            np.array([tasks], np.int64),
            np.array(call.ints, np.int64),
            np.array(call.floats, np.float32),
            np.array([-1 if b is None else b.nbytes for b in call.buffers], np.int64),
        )
        there = [b for b in call.buffers if b is not None]
        head = b"".join(np.int64(len(part)).tobytes() + part.tobytes() for part in lists)
        self._file.write_bytes(head + b"".join(b.tobytes() for b in there))
        done = subprocess.run([*self._command, str(self._file)], capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace"))
        at = 0
        for buffer in there:
            buffer[...] = np.frombuffer(done.stdout, buffer.dtype, buffer.size, at).reshape(buffer.shape)
            at += buffer.nbytes


def load(name: str, folder: Path) -> Library | Program:
    """The named variant, compiled into ``folder`` and ready to call."""
    variant = VARIANTS[name]
    if variant.emulator:
        return Program(build(variant, folder, program=True, extra=("-static",)), variant.emulator)
    return Library(build(variant, folder))
