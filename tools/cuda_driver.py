"""The CUDA driver by ctypes: loads PTX and launches its kernels on a stream of torch's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from tools.cuda_kernels import Launch, pack

#: CU_JIT_ERROR_LOG_BUFFER and its size; CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES (cuda.h).
LOG, LOG_SIZE, MAX_SHARED = 5, 6, 8
SHARED_DEFAULT = 48 * 1024


class NoCuda(Exception):
    """This machine runs no CUDA kernels; the message says why in one sentence."""


class CudaError(Exception):
    """A call of the driver failed; the message has its name and the driver's words."""


class Module:
    """A PTX, compiled by the driver for the current device of torch, whose context must exist.

    Raises:
        NoCuda: there is no libcuda.
        CudaError: the driver refused the PTX (its log is in the message) or a launch.
    """

    def __init__(self, ptx: bytes) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoCuda(f"no CUDA driver here ({error})") from None
        log = ctypes.create_string_buffer(16384)
        names = (ctypes.c_int * 2)(LOG, LOG_SIZE)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        self._module = ctypes.c_void_p()
        status = self._cuda.cuModuleLoadDataEx(ctypes.byref(self._module), ptx + b"\0", 2, names, values)
        self._check(status, "cuModuleLoadDataEx", log.value.decode(errors="replace"))
        self._functions: dict[str, ctypes.c_void_p] = {}

    def driver_version(self) -> str:
        """The newest CUDA that the driver knows: "13.0"."""
        version = ctypes.c_int()
        self._check(self._cuda.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def launch(self, plan: Launch, arguments: Sequence[Any], stream: int) -> None:
        """Launches a plan; tensors are passed by address, None is null, ints have 32 bits and floats are float32."""
        function = self._function(plan.name, plan.shared_bytes)
        self._check(
            self._cuda.cuLaunchKernel(
                function, *plan.grid, *plan.block, plan.shared_bytes, ctypes.c_void_p(stream), pack(arguments), None
            ),
            f"cuLaunchKernel of {plan.name}",
        )

    def _function(self, name: str, shared_bytes: int) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
            self._functions[name] = function
        if shared_bytes > SHARED_DEFAULT:
            status = self._cuda.cuFuncSetAttribute(self._functions[name], MAX_SHARED, shared_bytes)
            self._check(status, f"{shared_bytes} bytes of shared memory for {name}")
        return self._functions[name]

    def _check(self, status: int, what: str, log: str = "") -> None:
        if status:
            words = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(words))
            raise CudaError(f"{what}: {(words.value or b'unknown error').decode()} ({status}) {log}".strip())
