"""A strict reading of a safetensors header, before any tensor is touched.

Format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian header length, a JSON object
name -> {"dtype", "shape", "data_offsets": [begin, end)}, then the data without gaps, overlaps or trailing bytes.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import UnsafePath, WeightsError
from exporters.safe_files import refuse_lfs_pointer
from exporters.strict_json import parse_json

MAX_HEADER = 16 << 20
MAX_TENSORS = 50_000
# Bytes per element.
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, safetensors dtype name, shape, and [begin, end) in bytes within the file's data."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.begin


def _fail(what: str, where: str, way_out: str = "The file is damaged: fetch it again") -> WeightsError:
    return WeightsError(what, where=where, way_out=way_out)


def _whole(values: Any, where: str) -> list[int]:
    if not isinstance(values, list) or len(values) > 16:
        raise _fail(f"{values!r:.80} is not a short list", where)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise _fail(f"{value!r:.80} is not a whole number below 2**63", where)
    return values


def _tensor(name: str, entry: Any, path: Path, data: int) -> TensorInfo:
    where = f"{path}: {name[:200]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _fail("does not hold exactly dtype, shape and data_offsets", where)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _fail(f"unknown dtype {dtype!r:.40}", where, f"Known: {', '.join(DTYPES)}")
    shape = _whole(entry["shape"], f"{where}: shape")
    offsets = _whole(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data:
        raise _fail(f"data_offsets {offsets} do not lie within the {data} bytes of data", where)
    size = math.prod(shape) * DTYPES[dtype]
    if size != offsets[1] - offsets[0]:
        raise _fail(f"{dtype} {shape} takes {size} bytes, data_offsets span {offsets[1] - offsets[0]}", where)
    return TensorInfo(name, path, dtype, tuple(shape), offsets[0], offsets[1])


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file.

    Raises WeightsError for a header that is too short, too long, not strict JSON, holds more than MAX_TENSORS
    entries, or whose offsets, shapes, dtypes and file size do not agree exactly.
    """
    where = str(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror})", where=where, way_out="Fetch it again") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafePath("is not a regular file", where=where, way_out="Remove it")
        refuse_lfs_pointer(path)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _fail(f"is {len(prefix)} bytes long, a safetensors file has at least 8", where)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or length > status.st_size - 8:
            raise _fail(
                f"states a header of {length} bytes; the file has {status.st_size}, the limit is {MAX_HEADER}", where
            )
        raw = file.read(length)
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise _fail(f"lists more than {MAX_TENSORS} tensors", where, "Split or merge the tensors")
    header = parse_json(raw, where)
    if not isinstance(header, dict):
        raise _fail("the header is not a JSON object", where)
    header.pop("__metadata__", None)
    data = status.st_size - 8 - length
    tensors = {name: _tensor(name, entry, path, data) for name, entry in header.items()}
    position = 0
    for tensor in sorted(tensors.values(), key=lambda item: (item.begin, item.end)):
        if tensor.begin != position:
            kind = "overlaps the one before it" if tensor.begin < position else "leaves a gap before it"
            raise _fail(f"{tensor.name!r:.200} {kind} (begins at {tensor.begin}, wanted {position})", where)
        position = tensor.end
    if position != data:
        raise _fail(f"{data - position} bytes follow the last tensor", where)
    return tensors
