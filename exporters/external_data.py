"""One external-data file for several ONNX models: weights are streamed in once and shared by content."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from types import EllipsisType

import numpy as np
import onnx_ir as ir

#: Weights begin on this boundary, so that a runtime can map them and vector loads are aligned.
ALIGNMENT = 64
#: Smaller tensors stay inside the model file.
THRESHOLD = 256
#: Key of a lazy tensor's `meta`: what its bytes come from, and whatever else decides about them. Two tensors of equal
#: sources are equal, so the second is not even loaded.
SOURCE = "source"
#: Key of a lazy tensor's `meta`: reads some of its rows alone, where that can be done.
ROWS = "rows"
#: Key of a lazy tensor's `meta`: in how many equal pieces along its first axis other models of the file may have it.
PIECES = "pieces"


class WeightFile:
    """Writes each distinct tensor once; a context manager. Peak memory is one tensor.

    Args:
        path: a file that does not exist yet.
        progress: called with the size in bytes of every tensor written.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None):
        self.path = path
        self._progress = progress or (lambda size: None)
        self._offsets: dict[tuple[str, int], int] = {}
        self._sources: dict[Hashable, int] = {}

    def __enter__(self) -> WeightFile:
        self._file = open(self.path, "xb")
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def adopt(self, model: ir.Model) -> None:
        """Moves the initializers of ``model`` into this file, leaving references to it."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < THRESHOLD:
                continue
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._offset(tensor),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=self.path.parent,
            )
        self._file.flush()

    def _offset(self, tensor: ir.TensorProtocol) -> int:
        source = tensor.meta.get(SOURCE)
        if source is None:
            return self._write(_stored(tensor), tensor.meta.get(PIECES, 1))
        if source not in self._sources:
            self._sources[source] = self._write(_stored(tensor))
        return self._sources[source]

    def _write(self, data: bytes | memoryview, pieces: int = 1) -> int:
        key = _key(data)
        if key not in self._offsets:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            start = self._offsets[key] = self._file.tell()
            self._file.write(data)
            self._progress(len(data))
            size = len(data) // pieces
            if pieces > 1 and size % ALIGNMENT == 0:
                for offset in range(0, len(data), size):
                    self._offsets.setdefault(_key(data[offset : offset + size]), start + offset)
        return self._offsets[key]


def _key(data: bytes | memoryview) -> tuple[str, int]:
    return hashlib.sha256(data).hexdigest(), len(data)


def _stored(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The bytes that stand in the file: a view of the values, or a copy where they are packed or of the other order."""
    if tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return tensor.tobytes()
    values = np.ascontiguousarray(tensor.numpy())
    return memoryview(values.reshape(-1).view(np.uint8))


def initializer_values(value: ir.Value, part: int | EllipsisType = ...) -> np.ndarray:
    """An initializer's values, or one part of them along the first axis, copied: an external tensor maps the file and
    holds it open, which hundreds must not."""
    tensor = value.const_value
    found = np.array(tensor.numpy()[part])
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return found
