"""What a TVM artifact's files are held against before they are used: the machine, and the weights' own header."""

from __future__ import annotations

import json
import mmap
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from runtimes.errors import Fault
from runtimes.session import Array, BackendUnavailable

if TYPE_CHECKING:
    from runtimes.bundle import Artifact

#: Bytes of a cache line, on which TVM's code expects every tensor to begin.
ALIGNMENT = 64
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
_TYPES = {"F32": "float32", "F16": "float16", "U32": "uint32", "I32": "int32", "I64": "int64", "U8": "uint8",
          "I8": "int8", "BOOL": "bool"}  # fmt: skip


class WrongMachine(Fault):
    """The code needs an extension that this machine's processor does not have."""


class BrokenParameters(Fault):
    """The file of weights is not a whole safetensors file."""


def machine() -> str:
    """This machine's architecture, as profiles name it."""
    return _MACHINES.get(platform.machine(), platform.machine())


@cache
def extensions() -> frozenset[str]:
    """Instruction-set extensions of this machine, as profiles name them."""
    from device_profiles.host import detect

    return frozenset(detect()[0]["isa"] or ())


def is_foreign(artifact: Artifact) -> bool:
    """Whether the code is for another architecture than this machine's."""
    return bool(artifact.options["arch"] != machine())


def check_machine(artifact: Artifact) -> None:
    """Raises WrongMachine where this processor lacks an extension, BackendUnavailable for a GPU's code."""
    options = artifact.options
    where = f"{artifact.component} ({artifact.label})"
    if options.get("device", "cpu") != "cpu":
        raise BackendUnavailable(f"is code for {options['device']}", where, "Run it on such a device")
    if is_foreign(artifact):  # an emulator's matter
        return
    missing = sorted(set(options["isa"]) - extensions())
    if missing:
        raise WrongMachine(
            f"needs {', '.join(missing)}, this machine has {', '.join(sorted(extensions()))}",
            where,
            "Build the bundle with --profile host on this machine",
        )


def aligned(shape: Iterable[int], dtype: str | np.dtype) -> Array:
    """Zeros that begin on a cache line."""
    shape, kind = tuple(shape), np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def read_parameters(path: Path) -> dict[str, Array]:
    """Name -> weights, mapped into memory where they begin on a cache line, copied where they do not.

    Raises BrokenParameters.
    """
    try:
        with safe_open(path, "numpy"):  # the library holds the header against the file's size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            # A private copy on write: DLPack has no read-only tensors.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenParameters(f"cannot be read: {error}", str(path), "Fetch or build the bundle again") from error
    whole = np.frombuffer(mapped, np.uint8)
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        values = whole[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        if values.ctypes.data % ALIGNMENT:
            copy = aligned(values.shape, values.dtype)
            copy[...] = values
            values = copy
        weights[name] = values
    return weights
