"""One external-data file for several ONNX models: weights are streamed in once and shared by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

#: Weights begin on this boundary, so that a runtime can map them and vector loads are aligned.
ALIGNMENT = 64
#: Smaller tensors stay inside the model file.
THRESHOLD = 256


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
            data = tensor.tobytes()
            offset = self._write(data)
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                len(data),
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=self.path.parent,
            )
        self._file.flush()

    def _write(self, data: bytes) -> int:
        key = (hashlib.sha256(data).hexdigest(), len(data))
        if key not in self._offsets:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
            self._progress(len(data))
        return self._offsets[key]
