"""Spells out a quantised product for a runtime that takes symmetric, signed weights alone.

Given:  Product(x, codes uint8 [N, nb, w], scales [N, nb], zeros or none) {bits, columns}
Result: W = DequantizeLinear(codes - m, scales) and y = MatMul(x, W), where m = 2^(bits-1) makes the codes signed;
        blocks of INT4 or INT8 [nb*block, N] along axis 0, or INT8 per column [K, N] where a row has one scale.
        With zero points: y + MatMul(sum of x over each block, (m - zeros) * scales)

The second line is exact: sum over a block of (code - zero)*s*x = sum of (code - m)*s*x + (m - zero)*s * sum of x, a
correction of rank K/block. The offsets m - zeros are small integers, which every float type holds: nothing of the
student's quantisation is rounded.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.blocks import unpack_bits
from exporters.ops import BUILD
from exporters.passes.context import Context
from exporters.passes.editor import Editor
from exporters.passes.initializers import lazy_initializer

#: What is appended to a matrix's name for its signed codes, their scales, and the offsets m - zeros.
CODES, SCALES, OFFSETS = ".signed", ".columns", ".offsets"
#: bits of a code -> the type it is stored in; parsers know no narrower one than INT4
_TYPES = {2: ir.DataType.INT4, 4: ir.DataType.INT4, 8: ir.DataType.INT8}


def spell_products(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; the codes, scales and zero points that nothing else reads are dropped."""
    for node in list(model.graph):
        if node.domain == BUILD and node.op_type == "Product":
            _spell(model, node)


def _spell(model: ir.Model, node: ir.Node) -> None:
    x, codes, scales, zeros = (*node.inputs, None)[:4]
    bits, columns = node.attributes["bits"].as_int(), node.attributes["columns"].as_int()
    rows, blocks, width = codes.const_value.shape
    block = 8 * width // bits
    # One scale a row may stand there once for each block; then the codes past the last column need not be there.
    whole = bits == 8 and zeros is None and _uniform(scales.const_value)
    length = columns if whole else blocks * block
    prefix = codes.name.removesuffix(".codes")
    add = Editor(model, node)

    weight = lazy_initializer(
        model, prefix + CODES, _TYPES[bits], (length, rows), partial(_signed, codes.const_value, bits, length)
    )
    turned = lazy_initializer(
        model,
        prefix + SCALES,
        scales.dtype,
        (rows,) if whole else (blocks, rows),
        partial(_turned, scales.const_value, whole),
    )
    attributes = dict(axis=1) if whole else dict(axis=0, block_size=block)
    dequantised = add("DequantizeLinear", [weight, turned], attributes, scales.dtype, (length, rows))
    if length != columns:
        x = add.padded(x, length - columns)
    y = add("MatMul", [x, add.cast(dequantised, x.dtype)], {}, x.dtype, node.outputs[0].shape)
    if zeros is not None:
        offsets = lazy_initializer(
            model,
            prefix + OFFSETS,
            x.dtype,
            (blocks, rows),
            partial(_offsets, zeros.const_value, bits, blocks, x.dtype),
        )
        sums = add.block_sums(x, blocks)
        per_block = add(
            "Mul", [offsets, add.cast(add.reshape(turned, (blocks, rows)), x.dtype)], {}, x.dtype, (blocks, rows)
        )
        y = add("Add", [y, add("MatMul", [sums, per_block], {}, x.dtype, y.shape)], {}, x.dtype, y.shape)
    add.replace(y)


def _signed(codes: ir.TensorProtocol, bits: int, length: int) -> np.ndarray:
    """Codes minus 2^(bits-1) as int8 [length, N]."""
    values = codes.numpy()
    unsigned = unpack_bits(values.reshape(values.shape[0], -1), bits, length)
    return (unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8).T


def _uniform(scales: ir.TensorProtocol) -> bool:
    values = scales.numpy()
    return bool((values == values[:, :1]).all())


def _turned(scales: ir.TensorProtocol, whole: bool) -> np.ndarray:
    values = scales.numpy()
    return values[:, 0] if whole else values.T


def _offsets(zeros: ir.TensorProtocol, bits: int, blocks: int, dtype: ir.DataType) -> np.ndarray:
    return (2 ** (bits - 1) - unpack_bits(zeros.numpy(), bits, blocks).astype(np.float32)).T.astype(dtype.numpy())
