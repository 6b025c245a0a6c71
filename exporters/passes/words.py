"""Packed bytes as int32 words, which every TensorRT takes as weights; the bytes stay as they are."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.passes.initializers import lazy_initializer

#: What is appended to the name of the bytes.
SUFFIX = ".words"


def word_initializer(model: ir.Model, packed: ir.Value) -> ir.Value:
    """int32 [N, ceil(bytes of a row / 4)], little-endian, of the uint8 initializer ``packed`` [N, ...]; 0 pads."""
    rows, *rest = packed.const_value.shape
    count = -(-int(np.prod(rest, dtype=np.int64)) // 4)
    return lazy_initializer(
        model, packed.name + SUFFIX, ir.DataType.INT32, (rows, count), partial(_words, packed.const_value, count)
    )


def _words(packed: ir.TensorProtocol, count: int) -> np.ndarray:
    values = packed.numpy()
    flat = values.reshape(values.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, 4 * count - flat.shape[1]))).view("<i4").reshape(values.shape[0], count)
