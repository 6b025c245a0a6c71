"""Writes an 8-bit matrix as two 4-bit ones side by side, for float32 activations on a CPU.

Given:  MatMulNBits(x, codes, scales, zeros) {bits: 8, K}
Result: MatMulNBits(Concat(x, x), [high | low], [16 * scales | scales], [high zeros | low zeros]) {bits: 4, 2K}

With code = 16*high + low and zero = 16*high_zero + low_zero,
    scale * (code - zero) == 16*scale * (high - high_zero) + scale * (low - low_zero),
and 16 * scale is exact in float32, so the same weights are multiplied and the same bits are stored. ONNX Runtime has
a kernel for 4-bit rows; an 8-bit matrix it dequantises whole at every run (1.31, 1700 x 192, one row of x, one
thread: 294 us against 60 us). With int8 activations it has both kernels, so the fast form keeps the bytes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.blocks import pack_bits
from exporters.passes.context import Context
from exporters.passes.initializers import lazy_initializer

#: What the names of the parts of a split matrix end in.
SUFFIX = ".split"


def split_bytes(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; a matrix whose last block is padded is left as it is."""
    for node in list(model.graph):
        if node.op_type != "MatMulNBits" or node.attributes["bits"].as_int() != 8:
            continue
        columns, block = (node.attributes[key].as_int() for key in ("K", "block_size"))
        if columns % block == 0:
            _split(model, node, columns)


def _split(model: ir.Model, node: ir.Node, columns: int) -> None:
    x, codes, scales, zeros = (*node.inputs, None)[:4]
    rows, blocks, width = codes.const_value.shape
    twice = ir.node("Concat", [x, x], {"axis": -1}, metadata_props=dict(node.metadata_props))
    twice.outputs[0].dtype = x.dtype
    model.graph.insert_before(node, twice)
    tensors = (
        (codes, (rows, 2 * blocks, width // 2), partial(_codes, codes.const_value)),
        (scales, (rows, 2 * blocks), partial(_scales, scales.const_value)),
        (zeros, (rows, blocks), partial(_zeros, None if zeros is None else zeros.const_value, rows, blocks)),
    )
    node.replace_input_with(0, twice.outputs[0])
    node.resize_inputs(max(4, len(node.inputs)))
    prefix = codes.name.removesuffix("codes")
    for index, (part, (old, shape, load)) in enumerate(zip(("codes", "scales", "zeros"), tensors, strict=True), 1):
        dtype = scales.dtype if part == "scales" else ir.DataType.UINT8
        node.replace_input_with(index, lazy_initializer(model, f"{prefix}{part}{SUFFIX}", dtype, shape, load))
        if old is not None and not old.uses():
            del model.graph.initializers[old.name]
    node.attributes["bits"] = ir.AttrInt64("bits", 4)
    node.attributes["K"] = ir.AttrInt64("K", 2 * columns)


def _codes(codes: ir.TensorProtocol) -> np.ndarray:
    values = codes.numpy()
    rows, blocks, width = values.shape
    planes = np.concatenate([values >> 4, values & 15], 1)
    return pack_bits(planes.reshape(rows, -1), 4).reshape(rows, 2 * blocks, width // 2)


def _scales(scales: ir.TensorProtocol) -> np.ndarray:
    values = scales.numpy()
    return np.concatenate([values * values.dtype.type(16), values], 1)


def _zeros(zeros: ir.TensorProtocol | None, rows: int, blocks: int) -> np.ndarray:
    values = np.full((rows, blocks), 128, np.uint8) if zeros is None else zeros.numpy()
    return pack_bits(np.concatenate([values >> 4, values & 15], 1), 4)
