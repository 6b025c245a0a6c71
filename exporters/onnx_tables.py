"""Reads matrices of a table's codes back out of a written ONNX model (see exporters/passes/spell_tables.py)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.encodings import ENCODINGS, values
from exporters.external_data import initializer_values
from exporters.inheritance import StoredMatrix
from exporters.passes.spell_tables import CODES, TYPES
from exporters.program import Inherited

_NAMES = {dtype: name for name, dtype in TYPES.items()}


def table_name(node: ir.Node) -> str | None:
    """Prefix of the matrix whose codes a node reads, or None for a node that reads none."""
    names = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
    return next((name.removesuffix(CODES) for name in names if name.endswith(CODES)), None)


def read_table(node: ir.Node, layout: Inherited) -> StoredMatrix:
    """The matrix that a node reads, with what its codes stand for by what is computed with them."""
    return _READERS[node.op_type](node, layout)


def _dequantised(node: ir.Node, layout: Inherited) -> StoredMatrix:
    codes, scales = node.inputs[:2]
    held = initializer_values(codes).view(np.uint8).T
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else layout.columns
    return StoredMatrix(held, np.atleast_2d(_floats(scales)).T, None, layout.bits, block, _NAMES[codes.dtype])


def _gathered(cast: ir.Node, layout: Inherited) -> StoredMatrix:
    """Cast -> Gather from the table -> Reshape -> Mul by the scales of each block."""
    [gather] = cast.outputs[0].consumers()
    [reshape] = gather.outputs[0].consumers()
    [product] = reshape.outputs[0].consumers()
    table = initializer_values(gather.inputs[0])
    same = [name for name in ENCODINGS if np.array_equal(values(name), table, equal_nan=True)]
    scales = product.inputs[1]
    while not scales.is_initializer():  # a cast, of scales in float16
        scales = scales.producer().inputs[0]
    by_block = _floats(scales)[:, 0]
    codes = initializer_values(cast.inputs[0]).T
    return StoredMatrix(codes, by_block.T, None, layout.bits, codes.shape[1] // len(by_block), *same or ["unknown"])


def _bitsandbytes(node: ir.Node, layout: Inherited) -> StoredMatrix:
    rows, columns, block = (node.attributes[key].as_int() for key in ("N", "K", "block_size"))
    packed = initializer_values(node.inputs[1]).reshape(rows, -1)
    codes = np.stack((packed >> 4, packed & 15), -1).reshape(rows, columns)
    encoding = "nf4" if node.attributes["quant_type"].as_int() == 1 else "unknown"
    return StoredMatrix(codes, _floats(node.inputs[2]).reshape(rows, -1), None, 4, block, encoding)


_READERS = {"DequantizeLinear": _dequantised, "Cast": _gathered, "MatMulBnb4": _bitsandbytes}


def _floats(value: ir.Value) -> np.ndarray:
    return initializer_values(value).astype(np.float32)
