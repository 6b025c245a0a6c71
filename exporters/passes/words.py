"""Packed bytes as int32 words, which every TensorRT takes as weights; the bytes stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.passes.initializers import lazy_initializer

#: What is appended to the name of the bytes.
SUFFIX = ".words"


def word_initializer(model: ir.Model, packed: ir.Value) -> ir.Value:
    """int32 [N, ceil(bytes of a row / 4)], little-endian, of the uint8 initializer ``packed`` [N, ...]; 0 pads."""
    tensor = packed.const_value
    rows, *rest = tensor.shape
    count = -(-int(np.prod(rest, dtype=np.int64)) // 4)
    load = lambda: to_words(tensor.numpy())  # noqa: E731
    return lazy_initializer(model, packed.name + SUFFIX, ir.DataType.INT32, (rows, count), load)


def to_words(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, ...] -> int32 [N, ceil(bytes of a row / 4)]."""
    flat = packed.reshape(packed.shape[0], -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4)))
    return padded.view("<i4").reshape(packed.shape[0], -1)
