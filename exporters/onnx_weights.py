"""Reads quantised matrices back out of a written ONNX model, from the nodes that compute with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from exporters.blocks import unpack_bits
from exporters.external_data import initializer_values
from exporters.inheritance import LazyMatrices, StoredMatrix
from exporters.onnx_tables import read_table, table_name
from exporters.passes.fuse_experts import EXPERTS, MATRICES
from exporters.passes.part_products import PART, part_of
from exporters.passes.spell_integers import CODES as INTEGERS
from exporters.passes.spell_integers import INTEGER_PRODUCTS, OFFSET, SCALES
from exporters.passes.spell_tables import DOUBLED
from exporters.passes.split_bytes import SUFFIX
from exporters.program import Inherited

#: Operators that leave every feature's value what it is.
_MOVES = ("Cast", "Concat", "Identity", "Pad", "Reshape", "Slice", "Transpose")


def read_matrices(path: Path, inherited: Mapping[str, Inherited] = MappingProxyType({})) -> Mapping[str, StoredMatrix]:
    """Name of the matrix in the Program -> its values in the file and its external data, read on access.

    Only matrices that a node reads are there: a weight that nothing computes with did not arrive.

    Args:
        inherited: the Program's matrices; a table that is only looked up has its layout from there.
    """
    readers: dict[str, Callable[[], StoredMatrix]] = {}
    parts: dict[str, list[ir.Node]] = {}
    for node in ir.load(path).graph:
        if (name := table_name(node)) in inherited and node.op_type != "MatMulNBits":
            readers[name] = partial(read_table, node, inherited[name])
        elif node.op_type == "MatMulNBits" and part_of(node.inputs[1]) is not None:
            parts.setdefault(_matrix_name(node), []).append(node)
        elif node.op_type == "MatMulNBits":
            readers[_matrix_name(node)] = partial(_from_product, node)
        elif node.op_type == EXPERTS:
            readers |= _of_experts(node)
        elif node.op_type in INTEGER_PRODUCTS:
            readers[_matrix_name(node)] = partial(_from_integers, node)
        elif node.op_type == "DequantizeLinear":
            readers[_matrix_name(node)] = partial(_from_weight, node)
        elif node.op_type == "Gather" and (name := _table(node)) in inherited:
            readers.setdefault(name, partial(_from_lookup, node, inherited[name]))
    return LazyMatrices(readers | {name: partial(_from_parts, nodes) for name, nodes in parts.items()})


def _of_experts(node: ir.Node) -> dict[str, Callable[[], StoredMatrix]]:
    """The matrices of a layer's experts, by the names that exporters/passes/fuse_experts.py gave them."""
    first, *second = node.metadata_props[MATRICES].splitlines()
    return {first: partial(_from_experts, node, None)} | {
        name: partial(_from_experts, node, number) for number, name in enumerate(second)
    }


def _from_experts(node: ir.Node, expert: int | None) -> StoredMatrix:
    """The first matrix, of all experts, or the second one of ``expert``."""
    bits, block = node.attributes["expert_weight_bits"].as_int(), node.attributes["block_size"].as_int()
    places, part = ((2, 3, 11), ...) if expert is None else ((5, 6, 12), expert)
    codes, scales, zeros = (
        None if value is None else _rows(initializer_values(value, part))
        for value in (node.inputs[place] for place in places)
    )
    blocks = scales.shape[1]
    points = None if zeros is None else unpack_bits(zeros, bits, blocks)
    order = gathered(node.inputs[0]) if expert is None else None
    return StoredMatrix(unpack_bits(codes, bits, blocks * block), scales, points, bits, block, order=order)


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def _from_product(node: ir.Node) -> StoredMatrix:
    stored = _from_planes(node) if node.inputs[1].name.endswith(SUFFIX) else _from_matmul(node)
    return replace(stored, order=gathered(node.inputs[0]))


def _from_parts(nodes: list[ir.Node]) -> StoredMatrix:
    """The matrix whose rows exporters/passes/part_products.py gave to products of their own."""
    parts = [_from_product(node) for node in sorted(nodes, key=lambda node: part_of(node.inputs[1]))]
    first = parts[0]
    if any(not np.array_equal(part.order, first.order) for part in parts):
        return replace(first, codes=first.codes[:0])  # no rows: equal to nothing
    joined = {
        key: None if getattr(first, key) is None else np.concatenate([getattr(part, key) for part in parts])
        for key in ("codes", "scales", "zero_points")
    }
    return replace(first, **joined)


def _from_weight(node: ir.Node) -> StoredMatrix:
    return replace(_from_dequantize(node), order=order_of_product(node.outputs[0]))


def gathered(x: ir.Value) -> np.ndarray | None:
    """Indices of the gather along the last axis that ``x`` comes from; what only moves its values is passed through."""
    node = x.producer()
    while node is not None and node.op_type in _MOVES:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.inputs[1].const_value is None:
        return None
    source, axis = node.inputs[0], node.attributes["axis"].as_int()
    if source.const_value is not None or axis not in (-1, len(source.shape or ()) - 1):
        return None
    return initializer_values(node.inputs[1])


def order_of_product(weight: ir.Value) -> np.ndarray | None:
    """``gathered`` of the other factor of the product that a dequantised weight goes into."""
    while True:
        user = weight.uses()[0].node
        if user.op_type == "MatMul":
            return gathered(user.inputs[0])
        if user.op_type not in _MOVES:
            return None
        weight = user.outputs[0]


def _matrix_name(node: ir.Node) -> str:
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.inputs[1]
    name = PART.sub("", codes.name).removesuffix(".typed").removesuffix(SUFFIX).removesuffix(".codes")
    return name.removesuffix(DOUBLED).removesuffix(INTEGERS)


def _table(node: ir.Node) -> str:
    return (node.inputs[0].name or "").removesuffix(".codes")


def _from_lookup(node: ir.Node, layout: Inherited) -> StoredMatrix:
    """A table of codes whose rows are gathered, with the scales and zero points of the same name."""
    initializers = node.graph.initializers
    packed = initializer_values(node.inputs[0])
    rows, blocks = packed.shape[:2]
    prefix = _table(node)
    zeros = initializers.get(f"{prefix}.zeros")
    codes = unpack_bits(packed.reshape(rows, -1), layout.bits, blocks * layout.block)
    points = None if zeros is None else unpack_bits(initializer_values(zeros), layout.bits, blocks)
    scales = initializer_values(initializers[f"{prefix}.scales"])
    return StoredMatrix(codes, scales, points, layout.bits, layout.block, layout.encoding)


def _from_matmul(node: ir.Node) -> StoredMatrix:
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    _, codes, scales, zeros = node.inputs[:4] if len(node.inputs) > 3 else (*node.inputs[:3], None)
    packed = initializer_values(codes)
    rows, blocks = packed.shape[:2]
    unpacked = unpack_bits(packed.reshape(rows, -1), bits, blocks * block)
    points = None if zeros is None else unpack_bits(initializer_values(zeros).reshape(rows, -1), bits, blocks)
    return StoredMatrix(unpacked, initializer_values(scales).reshape(rows, blocks), points, bits, block)


def _from_integers(node: ir.Node) -> StoredMatrix:
    """A matrix with one scale a row, whose scales are where the product or what follows it multiplies with them."""
    codes = initializer_values(node.inputs[1]).T
    rows, columns = codes.shape
    points = np.broadcast_to(initializer_values(node.inputs[INTEGER_PRODUCTS[node.op_type]]), (rows,))
    reader = node
    while (scales := next((v for v in reader.inputs if v and (v.name or "").endswith(SCALES)), None)) is None:
        [reader] = reader.outputs[0].consumers()
    zeros = None if (points == OFFSET).all() else points[:, None]
    return StoredMatrix(codes, initializer_values(scales)[:, None], zeros, 8, columns)


def _from_dequantize(node: ir.Node) -> StoredMatrix:
    bits, block = node.inputs[0].dtype.bitwidth, node.attributes["block_size"].as_int()
    values = (initializer_values(value) for value in node.inputs)
    codes, scales, zeros = values if node.attributes["axis"].as_int() == 1 else (value.T for value in values)
    return StoredMatrix(codes.astype(np.uint8), scales, zeros.astype(np.uint8), bits, block)


def _from_planes(node: ir.Node) -> StoredMatrix:
    """The 8-bit matrix that exporters/passes/split_bytes.py wrote as a plane of high and one of low nibbles.

    The scales of the high plane must be 16 times those of the low one; where they are not, the matrix comes back
    with NaN scales, which equal nothing.
    """
    planes = _from_matmul(node)
    high, low = np.split(planes.codes, 2, 1)
    coarse, fine = np.split(planes.scales, 2, 1)
    high_zero, low_zero = np.split(planes.zero_points, 2, 1)
    scales = np.where(coarse == 16 * fine, fine, np.float32("nan"))
    return StoredMatrix(16 * high + low, scales, 16 * high_zero + low_zero, 8, planes.block)
