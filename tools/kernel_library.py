"""Builds kernels/cpu for one instruction set and calls its kernels with NumPy arrays, here or in an emulator."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters import tvm_targets
from exporters.tvm_targets import Variant

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "kernels" / "cpu"
SHIM = Path(__file__).with_name("kernel_shim.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


#: name -> (architecture, variant) of every build that exports make, as exporters/tvm_targets.py has them.
VARIANTS: Mapping[str, tuple[str, Variant]] = {
    variant.name: (arch, variant) for arch, variants in tvm_targets.VARIANTS.items() for variant in variants
}
#: architecture -> (what runs its programs elsewhere, what they are linked with for that)
EMULATORS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"aarch64": (("qemu-aarch64",), ("-static",))}


def is_native(name: str) -> bool:
    """Whether this CPU has what the variant needs."""
    arch, variant = VARIANTS[name]
    cpu = Path("/proc/cpuinfo")
    there = set(cpu.read_text().split()) if cpu.exists() else set()
    return platform.machine() == arch and set(variant.isa) <= there | ({"neon"} if arch == "aarch64" else set())


def runs_here(name: str) -> bool:
    """Whether this machine compiles the variant and runs it, itself or by an emulator."""
    emulator = EMULATORS.get(VARIANTS[name][0])
    able = is_native(name) or (emulator is not None and shutil.which(emulator[0][0]) is not None)
    return able and shutil.which(_compiler(name)) is not None


def _compiler(name: str) -> str:
    arch = VARIANTS[name][0]
    return "g++" if arch == platform.machine() else tvm_targets.CROSS[arch, "linux"][0]


def build(name: str, folder: Path, *, program: bool = False, extra: Sequence[str] = ()) -> Path:
    """Compiles the kernels and the shim into a shared library, or a program, in ``folder``; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler refused, with its words on standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *WARNINGS, *VARIANTS[name][1].flags, *extra, f"-I{SOURCES}"]
    flags += ["-DEDGE_PROGRAM"] if program else []
    objects = []
    for source in (*sorted(SOURCES.glob("*.cpp")), SHIM):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([_compiler(name), *flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    target = folder / ("kernels" if program else "kernels.so")
    link = [*extra, *([] if program else ["-shared"]), *map(str, objects), "-o", str(target)]
    subprocess.run([_compiler(name), *link], check=True)
    return target


@dataclass(frozen=True)
class Call:
    """One kernel's arguments in the order of the shim: arrays (None is null), integers and floats."""

    name: str
    buffers: Sequence[Array | None]
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()


class Library:
    """A shared library of kernels, called in this process."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __call__(self, call: Call, tasks: int = 1) -> None:
        """Runs all tasks, one after the other; results are in the call's arrays."""
        for task in range(tasks):
            if self._library.edge_call(*_pointers(call), task, tasks):
                raise ValueError(f"no kernel {call.name!r}")

    def repeated(self, call: Call, times: int) -> Callable[[], None]:
        """A function that makes the call so many times, its arguments converted once."""
        pointers = _pointers(call)

        def run(keep: Call = call) -> None:  # the pointers hold the arrays' addresses only
            if self._library.edge_repeat(*pointers, times):
                raise ValueError(f"no kernel {keep.name!r}")

        return run


def _pointers(call: Call) -> tuple[Any, ...]:
    """The name and the lists as C takes them."""
    pointers = (ctypes.c_void_p * len(call.buffers))(*(None if b is None else b.ctypes.data for b in call.buffers))
    ints = (ctypes.c_int64 * len(call.ints))(*map(int, call.ints))
    return call.name.encode(), pointers, ints, (ctypes.c_float * len(call.floats))(*call.floats)


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
    """The variant, compiled into ``folder`` and ready to call; ``runs_here`` says whether there is a way."""
    if is_native(name):
        return Library(build(name, folder))
    emulator, link = EMULATORS[VARIANTS[name][0]]
    return Program(build(name, folder, program=True, extra=link), emulator)
