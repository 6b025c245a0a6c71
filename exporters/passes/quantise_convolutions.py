"""Puts explicit Q/DQ around convolutions: symmetric INT8, activations per tensor, weights per output channel.

Given:  Conv(x, W, b)
Result: Conv(DequantizeLinear(QuantizeLinear(x, s)), DequantizeLinear(round(W / t), t), b)
        with s from calibration and t[c] = max |W[c]| / 127
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.passes.editor import Editor
from exporters.passes.initializers import lazy_initializer

LIMIT = 127


def quantise_convolutions(model: ir.Model, ranges: Mapping[str, float]) -> None:
    """Edits ``model`` in place.

    Args:
        ranges: name of a Conv -> largest magnitude of its input; the others stay as they are.
    """
    for node in list(model.graph):
        if node.op_type != "Conv" or node.name not in ranges:
            continue
        x, weight = node.inputs[:2]
        add = Editor(model, node)
        scale = add.constant(np.array(ranges[node.name] / LIMIT, np.float32).astype(x.dtype.numpy()))
        zero = add.constant(np.array(0, np.int8))
        codes = add("QuantizeLinear", [x, scale, zero], {}, ir.DataType.INT8, x.shape)
        node.replace_input_with(0, add("DequantizeLinear", [codes, scale, zero], {}, x.dtype, x.shape))
        tensor, channels = weight.const_value, weight.const_value.shape[0]
        quantised = lazy_initializer(
            model, f"{weight.name}.int8", ir.DataType.INT8, tuple(tensor.shape), partial(_codes, tensor)
        )
        scales = lazy_initializer(model, f"{weight.name}.scales", x.dtype, (channels,), partial(_scales, tensor))
        dequantised = add("DequantizeLinear", [quantised, scales], {"axis": 0}, x.dtype, tensor.shape)
        node.replace_input_with(1, dequantised)


def _scales(weight: ir.TensorProtocol) -> np.ndarray:
    """In the weight's own dtype; 1 for a channel of zeros."""
    values = np.abs(weight.numpy()).reshape(weight.shape[0], -1).max(1).astype(np.float32)
    return np.where(values > 0, values / LIMIT, 1).astype(weight.dtype.numpy())


def _codes(weight: ir.TensorProtocol) -> np.ndarray:
    values = weight.numpy().astype(np.float32)
    scales = _scales(weight).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return np.clip(np.rint(values / scales), -LIMIT, LIMIT).astype(np.int8)
