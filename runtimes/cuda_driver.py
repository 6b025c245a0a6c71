"""The functions of CUDA's driver that a session needs, by ctypes: no CUDA toolkit on the device, no package.

`Driver` is the `Device` of runtimes/device_engine.py. Source of names, constants and structures: cuda.h, CUDA Driver
API.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np

from runtimes.errors import DRIVER, Fault
from runtimes.session import Array, BackendUnavailable, OutOfDeviceMemory

_OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class CudaError(Fault):
    """The driver refused a call."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        *((f"src{name}", kind) for name, kind in (("X", c_size_t), ("Y", c_size_t), ("Type", c_uint))),
        *((f"src{name}", c_void_p) for name in ("Host", "Device", "Array")),
        ("srcPitch", c_size_t),
        *((f"dst{name}", kind) for name, kind in (("X", c_size_t), ("Y", c_size_t), ("Type", c_uint))),
        *((f"dst{name}", c_void_p) for name in ("Host", "Device", "Array")),
        ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    )


class Driver:
    """The first device, its primary context made current, and one stream. `close` gives them back."""

    def __init__(self) -> None:
        """Raises BackendUnavailable where there is no driver or no device."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BackendUnavailable(
                "there is no CUDA driver here", "libcuda.so.1", "Run this on the device that the bundle is for"
            ) from error
        if self._cuda.cuInit(0):
            raise BackendUnavailable("finds no GPU", "libcuda.so.1", "Run this on the device that the bundle is for")
        self._device, self._context, self.stream = c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGet", byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self.enter()
        self._call("cuStreamCreate", byref(self.stream), c_uint(_NON_BLOCKING))

    def close(self) -> None:
        """Releases stream and context; a second call does nothing."""
        if self.stream:
            self._cuda.cuStreamDestroy_v2(self.stream)
            self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)
            self.stream = c_void_p()

    def enter(self) -> None:
        """See Device: a context is current in one thread, and a session may go from thread to thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        """The GPU's."""
        text = (c_char * 128)()
        self._call("cuDeviceGetName", text, 128, self._device)
        return text.value.decode()

    @property
    def uuid(self) -> str:
        """Of the GPU, as hexadecimal digits: no other has it."""
        raw = (c_char * 16)()
        self._call("cuDeviceGetUuid_v2", raw, self._device)
        return bytes(raw).hex()

    @property
    def sm(self) -> str:
        """Compute capability, as in "sm_87"."""
        major, minor = c_int(), c_int()
        self._call("cuDeviceGetAttribute", byref(major), _MAJOR, self._device)
        self._call("cuDeviceGetAttribute", byref(minor), _MINOR, self._device)
        return f"sm_{major.value}{minor.value}"

    @property
    def cuda(self) -> str:
        """The newest CUDA that the driver serves, as in "12.6"."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes, zeroed. Raises OutOfDeviceMemory."""
        pointer = c_void_p()
        self._call("cuMemAlloc_v2", byref(pointer), c_size_t(max(size, 1)))
        self._call("cuMemsetD8Async", pointer, 0, c_size_t(max(size, 1)), self.stream)
        return int(pointer.value or 0)

    def pinned(self, size: int) -> Array:
        """See Device. Raises OutOfDeviceMemory."""
        pointer, context = c_void_p(), c_void_p()
        self._call("cuMemAllocHost_v2", byref(pointer), c_size_t(max(size, 1)))
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        return np.asarray(_Pinned(self._cuda, self._device, context, int(pointer.value or 0), size))

    def free(self, pointer: int) -> None:
        """Gives device memory back."""
        self._cuda.cuMemFree_v2(c_void_p(pointer))

    def to_device(self, target: int, source: int, size: int) -> None:
        """Host to device, in the stream's order."""
        self._call("cuMemcpyHtoDAsync_v2", c_void_p(target), c_void_p(source), c_size_t(size), self.stream)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Device to host, in the stream's order."""
        self._call("cuMemcpyDtoHAsync_v2", c_void_p(target), c_void_p(source), c_size_t(size), self.stream)

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """``rows`` rows of ``width`` bytes within the device, ``pitch`` bytes apart, in the stream's order."""
        copy = _Copy2D()
        copy.srcType = copy.dstType = _DEVICE_MEMORY
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, pitch
        copy.WidthInBytes, copy.Height = width, rows
        self._call("cuMemcpy2DAsync_v2", byref(copy), self.stream)

    def wait(self) -> None:
        """Until everything in the stream is done."""
        self._call("cuStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """From here on the stream's work is recorded instead of run."""
        self._call("cuStreamBeginCapture_v2", self.stream, _RELAXED)

    def end_capture(self) -> c_void_p:
        """What was recorded, ready to launch."""
        graph, executable = c_void_p(), c_void_p()
        self._call("cuStreamEndCapture", self.stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, ctypes.c_ulonglong(0))
        self._cuda.cuGraphDestroy(graph)
        return executable

    def launch(self, recorded: c_void_p) -> None:
        """Runs what was recorded."""
        self._call("cuGraphLaunch", recorded, self.stream)

    def release(self, recorded: c_void_p) -> None:
        """Forgets it."""
        self._cuda.cuGraphExecDestroy(recorded)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"{name}: out of device memory", "CUDA", "Use a shorter context or a smaller model")
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, byref(text))
            raise CudaError(f"{name}: {(text.value or b'error').decode()} ({code})", "CUDA", DRIVER)


class _Pinned:
    """Page-locked memory as an array's base: it goes, and its hold on the context with it, when no view is left."""

    def __init__(self, cuda: ctypes.CDLL, device: c_int, context: c_void_p, pointer: int, size: int) -> None:
        self._cuda, self._device, self._context, self._pointer = cuda, device, context, c_void_p(pointer)
        self.__array_interface__: dict[str, Any] = {
            "data": (pointer, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        # The last view may go in a thread that has another context, or none.
        self._cuda.cuCtxPushCurrent_v2(self._context)
        self._cuda.cuMemFreeHost(self._pointer)
        self._cuda.cuCtxPopCurrent_v2(byref(c_void_p()))
        self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)
