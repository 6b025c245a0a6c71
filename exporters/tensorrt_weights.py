"""Reads quantised matrices back out of a written TensorRT artifact, from the nodes that compute with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.blocks import unpack_bits
from exporters.external_data import initializer_values
from exporters.inheritance import StoredMatrix
from exporters.onnx_tables import read_table, table_name
from exporters.onnx_weights import gathered, order_of_product
from exporters.ops.tensorrt import EDGE, WEIGHTS_AT
from exporters.passes.spell_products import CODES, OFFSETS
from exporters.passes.words import SUFFIX
from exporters.program import Inherited


def read_matrices(path: Path, inherited: Mapping[str, Inherited]) -> Mapping[str, StoredMatrix]:
    """Name of the matrix in the Program -> its values in the file and its external data.

    A tied table stands in the file twice where it is looked up in one layout and multiplied with in another; copies
    that differ come back with NaN scales, which equal nothing.
    """
    found: dict[str, StoredMatrix] = {}
    for prefix, stored in _stored(ir.load(path), inherited):
        other = found.get(prefix)
        found[prefix] = stored if other is None or _equal(stored, other) else _broken(stored)
    return found


def _stored(model: ir.Model, inherited: Mapping[str, Inherited]) -> Iterator[tuple[str, StoredMatrix]]:
    initializers = model.graph.initializers
    for node in model.graph:
        name = node.inputs[0].name or "" if node.inputs and node.inputs[0] is not None else ""
        if (table := table_name(node)) is not None:
            yield table, read_table(node, inherited[table])
        elif node.op_type == "DequantizeLinear" and name.endswith(CODES):
            prefix = name.removesuffix(CODES)
            stored = _from_signed(node, initializers.get(prefix + OFFSETS), inherited[prefix])
            yield prefix, replace(stored, order=order_of_product(node.outputs[0]))
        elif node.op_type == "Gather" and name.endswith(f".codes{SUFFIX}"):
            prefix = name.removesuffix(f".codes{SUFFIX}")
            scales, zeros = initializers[f"{prefix}.scales"], initializers.get(f"{prefix}.zeros{SUFFIX}")
            yield prefix, _from_words(node.inputs[0], scales, zeros, inherited[prefix])
        elif node.domain == EDGE and node.op_type in WEIGHTS_AT:
            codes, scales, zeros = node.inputs[WEIGHTS_AT[node.op_type] :][:3]
            prefix = (codes.name or "").removesuffix(f".codes{SUFFIX}")
            stored = _from_words(codes, scales, zeros, inherited[prefix])
            yield prefix, replace(stored, order=gathered(node.inputs[0]))


def _from_signed(node: ir.Node, offsets: ir.Value | None, layout: Inherited) -> StoredMatrix:
    middle = 2 ** (layout.bits - 1)
    codes = (initializer_values(node.inputs[0]).astype(np.int16) + middle).astype(np.uint8).T
    scales = np.atleast_2d(initializer_values(node.inputs[1]).astype(np.float32)).T
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else layout.columns
    bits = max(layout.bits, 4)  # of the field: 2 bits lie in INT4
    if offsets is None:
        points = None if bits == layout.bits else np.full(scales.shape, middle, np.uint8)
        return StoredMatrix(codes, scales, points, bits, block)
    # Offsets are whole numbers: half a step in the file is damage, and must not be rounded away.
    exact = middle - initializer_values(offsets).astype(np.float32).T
    points = np.clip(np.nan_to_num(np.rint(exact)), 0, 2 * middle - 1)
    stored = StoredMatrix(codes, scales, points.astype(np.uint8), bits, block)
    return stored if np.array_equal(points, exact) else _broken(stored)


def _from_words(codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, layout: Inherited) -> StoredMatrix:
    table = initializer_values(scales).astype(np.float32)
    blocks = table.shape[1]
    points = None if zeros is None else unpack_bits(_bytes(zeros), layout.bits, blocks)
    return StoredMatrix(
        unpack_bits(_bytes(codes), layout.bits, blocks * layout.block),
        table,
        points,
        layout.bits,
        layout.block,
        layout.encoding,
    )


def _bytes(words: ir.Value) -> np.ndarray:
    table = np.ascontiguousarray(initializer_values(words), "<i4")
    return table.view(np.uint8).reshape(table.shape[0], -1)


def _equal(one: StoredMatrix, other: StoredMatrix) -> bool:
    """Whether two copies hold the same matrix, however each is cut into blocks."""
    columns = min(one.codes.shape[1], other.codes.shape[1])
    return all(map(np.array_equal, _columns(one, columns), _columns(other, columns)))


def _columns(stored: StoredMatrix, columns: int) -> Iterator[np.ndarray]:
    """Codes, scales and zero points of each of the first columns."""
    middle = np.full(stored.scales.shape, 2 ** (stored.bits - 1), np.uint8)
    yield stored.codes[:, :columns]
    for part in (stored.scales, middle if stored.zero_points is None else stored.zero_points):
        yield np.repeat(part, stored.block, 1)[:, :columns]


def _broken(stored: StoredMatrix) -> StoredMatrix:
    nothing = np.full_like(stored.scales, np.nan)
    return StoredMatrix(stored.codes, nothing, stored.zero_points, stored.bits, stored.block)
