"""The CUDA kernels on this machine: compiled by g++ to run on the CPU, and their plans as functions.

PTX is made by exporters/cuda_kernels.py; here is what tests and the benchmark need beside it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.cuda_kernels import SOURCES

HOST = SOURCES / "common" / "host.cpp"
#: Without unique symbols, so that each library of kernels has a machine and a table of its own.
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class Launch(ctypes.Structure):
    """EdgeLaunch of kernels/cuda/common/launch.h."""

    _fields_ = (
        ("kernel", ctypes.c_char * 96),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
    )

    @property
    def name(self) -> str:
        return self.kernel.decode()


def launch_of(kernel: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int = 0) -> Launch:
    """A launch by hand; what ships comes from plan.h."""
    sizes = [(*part, 1, 1)[:3] for part in (grid, block)]
    return Launch(kernel.encode(), (ctypes.c_uint * 3)(*sizes[0]), (ctypes.c_uint * 3)(*sizes[1]), shared_bytes)


def build_host(source: Path, library: Path, *, extra: Sequence[str] = ()) -> Path:
    """Compiles one op's .cuh, and the plan.h beside it if there is one, into ``library`` for this CPU.

    Raises:
        subprocess.CalledProcessError: g++ refused, with its words on standard error.
    """
    plan = source.with_name("plan.h")
    defines = [f'-DEDGE_SOURCE="{source}"', *([f'-DEDGE_PLAN="{plan}"'] if plan.exists() else [])]
    command = ["g++", *FLAGS, *WARNINGS, *extra, *defines, f"-I{SOURCES}", f"-I{SOURCES / 'common'}", str(HOST)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def build_plans(library: Path) -> Path:
    """All plan.h in one small library, without any kernel."""
    plans = sorted(SOURCES.glob("*/plan.h"))
    source = "#define EDGE_EXPORT_PLANS\n" + "".join(f'#include "{plan}"\n' for plan in plans)
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", *WARNINGS, f"-I{SOURCES}", "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(library)], input=source.encode(), check=True)
    return library


class Plans:
    """The `edge_plan_<name>` functions of a library of plans."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *fields: int | float) -> list[Launch]:
        """The launches for a shape, whose fields are given in the order of its struct; [] where no kernel takes it."""
        types = [ctypes.c_float if isinstance(field, float) else ctypes.c_int for field in fields]
        kinds = [(f"f{i}", kind) for i, kind in enumerate(types)]
        shape = type("Shape", (ctypes.Structure,), {"_fields_": kinds})(*fields)
        launches = (Launch * 4)()
        count = getattr(self._library, f"edge_export_plan_{name}")(ctypes.byref(shape), launches)
        return list(launches[:count])


class HostKernels(Plans):
    """One op's kernels, run on the CPU by cuda_on_cpu.h."""

    def names(self) -> list[str]:
        """All entry points."""
        self._library.edge_cpu_entry.restype = ctypes.c_char_p
        found, i = [], 0
        while (name := self._library.edge_cpu_entry(i)) is not None:
            found.append(name.decode())
            i += 1
        return found

    def launch(self, plan: Launch, arguments: Sequence[Any]) -> None:
        """Runs a launch; arrays are passed by address (None is null), ints as 32 bits, floats as float32.

        Raises:
            ValueError: there is no such entry point.
        """
        if self._library.edge_cpu_launch(ctypes.byref(plan), pack(arguments)):
            raise ValueError(f"no kernel {plan.name!r}")


def pack(arguments: Sequence[Any]) -> Any:
    """cuLaunchKernel's array of pointers to the arguments; numbers of other widths must not be among them."""
    held = [_as_c(argument) for argument in arguments]
    packed = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
    packed.held = (held, arguments)  # type: ignore[attr-defined]  # the pointers hold addresses only
    return packed


def _as_c(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous, "kernels take contiguous arrays"
        return ctypes.c_void_p(argument.ctypes.data)
    if hasattr(argument, "data_ptr"):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)
