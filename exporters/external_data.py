"""External-data files of ONNX models: weights are streamed in once and shared by content."""

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

#: Key of a lazy tensor's `meta`: (source, i), where its bytes are the i-th of equal pieces of those of another source.
PIECE = "piece"

_Key = tuple[str, int]  # SHA-256 and size of a tensor's bytes
_Place = tuple[str, int]  # name of the file, and where in it they begin


class WeightFile:
    """Writes each distinct tensor once; a context manager. Peak memory is one tensor.

    A file that nothing is written to is not left behind.

    Args:
        path: a file that does not exist yet.
        progress: called with the size in bytes of every tensor written.
        earlier: a file of the same folder; tensors that stand in it are not written again.
    """

    def __init__(
        self, path: Path, progress: Callable[[int], None] | None = None, earlier: WeightFile | None = None
    ) -> None:
        self.path = path
        self._progress = progress or (lambda size: None)
        self._places: dict[_Key, _Place] = {} if earlier is None else dict(earlier._places)
        self._sources: dict[Hashable, _Place] = {} if earlier is None else dict(earlier._sources)

    def __enter__(self) -> WeightFile:
        self._file = open(self.path, "xb")
        return self

    def __exit__(self, *exception) -> None:
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self.path.unlink()

    def adopt(self, model: ir.Model) -> None:
        """Moves the initializers of ``model`` into this file, leaving references to it and to earlier ones."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < THRESHOLD:
                continue
            file, offset = self._place(tensor)
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=self.path.parent,
            )
        self._file.flush()

    def _place(self, tensor: ir.TensorProtocol) -> _Place:
        whole, index = tensor.meta.get(PIECE, (None, 0))
        if whole in self._sources and tensor.nbytes % ALIGNMENT == 0:
            file, start = self._sources[whole]
            return file, start + index * tensor.nbytes
        source = tensor.meta.get(SOURCE)
        if source is None:
            return self._write(_stored(tensor))
        if source not in self._sources:
            self._sources[source] = self._write(_stored(tensor))
        return self._sources[source]

    def _write(self, data: bytes | memoryview) -> _Place:
        key = _key(data)
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[key] = self.path.name, self._file.tell()
            self._file.write(data)
            self._progress(len(data))
        return self._places[key]


def _key(data: bytes | memoryview) -> _Key:
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
