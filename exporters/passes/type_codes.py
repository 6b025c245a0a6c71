"""Gives packed codes their ONNX type, so that DequantizeLinear can take them.

Given:  DequantizeLinear(codes uint8 [N, nb, w], scales [N, nb], zeros uint8 [N, p] or none) {block_size}
Result: DequantizeLinear(codes UINT4 [N, nb*block], scales [N, nb], zeros UINT4 [N, nb])    (UINT8 for 8 bit)

The bytes of the codes stay as they are: ONNX packs UINT4 low nibble first in row-major order, as MatMulNBits does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.blocks import pack_bits, unpack_bits
from exporters.passes.context import Context
from exporters.passes.initializers import shared_initializer

#: bits of a code -> its type: opset 24 has none of 2 bits
TYPES = {2: ir.DataType.UINT4, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def type_codes(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0].dtype != ir.DataType.UINT8:
            continue  # those of other types are written as what they are already
        codes, scales, zeros = (*node.inputs, None)[:3]
        block = node.attributes["block_size"].as_int()
        rows, blocks, width = codes.const_value.shape
        bits = 8 * width // block
        load = partial(_codes, codes.const_value, bits, blocks * block)
        node.replace_input_with(0, _initializer(model, f"{codes.name}.typed", load, bits, (rows, blocks * block)))
        source = None if zeros is None else zeros.const_value
        load = partial(_zero_points, source, bits, rows, blocks)
        typed = _initializer(model, f"{scales.name.removesuffix('scales')}zeros.typed", load, bits, (rows, blocks))
        node.resize_inputs(3)
        node.replace_input_with(2, typed)


def _initializer(
    model: ir.Model, name: str, load: Callable[[], np.ndarray], bits: int, shape: tuple[int, int]
) -> ir.Value:
    dtype = TYPES[bits]
    tensor = ir.LazyTensor(partial(_packed, load, dtype, shape, name), dtype=dtype, shape=ir.Shape(shape), name=name)
    return shared_initializer(model, tensor)


def _packed(load: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, int], name: str) -> ir.TensorProtocol:
    data = load()
    if dtype.bitwidth == 8:
        return ir.Tensor(data.reshape(shape), name=name)
    return ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=name)


def _codes(packed: ir.TensorProtocol, bits: int, columns: int) -> np.ndarray:
    """The bytes of the codes; two bits are given fields of four."""
    values = packed.numpy()
    if bits > 2:
        return values.reshape(-1)
    return pack_bits(unpack_bits(values.reshape(values.shape[0], -1), bits, columns).reshape(1, -1), 4).reshape(-1)


def _zero_points(packed: ir.TensorProtocol | None, bits: int, rows: int, blocks: int) -> np.ndarray:
    """Zero points of all blocks, contiguous; a symmetric weight has 2^(bits-1) everywhere."""
    if packed is None:
        values = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
    else:
        values = unpack_bits(packed.numpy(), bits, blocks)
    return pack_bits(values.reshape(1, -1), max(bits, 4)).reshape(-1)
