"""Quantised matrices in an OpenVINO model: how they are written, and how they are read back.

    Constant u4 [N, nb, G] -> Convert -> Subtract(Convert(Constant u4 [N, nb, 1])) -> Multiply(Constant f32 [N, nb, 1])
    -> Reshape [N, nb*G] -> MatMul or Gather

The plugins keep this form compressed: codes are read as they are stored and dequantised inside the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op

from exporters.blocks import pack_bits, unpack_bits
from exporters.encodings import ENCODINGS
from exporters.inheritance import StoredMatrix
from exporters.ops.openvino import CODE_TYPES, TABLE_TYPES

CODES = ".codes"


def dequantised(load: Callable[[str], np.ndarray], codes: str, scales: str, zeros: str | None, bits: int) -> ov.Output:
    """float32 [N, nb*G] of the constants of those names, which the nodes carry on.

    Args:
        load: name -> values, in the layout of ``edge::quantized_linear``.
        zeros: None for a symmetric matrix: every zero point is 2^(bits-1).
    """
    packed = load(codes)
    rows, blocks, width = packed.shape
    block = 8 * width // bits
    stored = _typed(packed, (rows, blocks, block), bits, codes)
    if zeros is None:
        middle = pack_bits(np.full((1, 1), 2 ** (bits - 1), np.uint8), bits)
        points = _typed(middle, (1, 1, 1), bits, codes.replace(CODES, ".zeros"))
    else:  # rows of packed zero points end in padding, the elements of a constant do not
        each = unpack_bits(load(zeros), bits, blocks)
        points = _typed(pack_bits(each.reshape(1, -1), bits), (rows, blocks, 1), bits, zeros)
    scale = op.constant(load(scales).reshape(rows, blocks, 1))
    scale.set_friendly_name(scales)
    centred = op.subtract(op.convert(stored, "f32"), op.convert(points, "f32"))
    return op.reshape(op.multiply(centred, scale), op.constant(np.array([rows, blocks * block])), False).output(0)


def looked_up(load: Callable[[str], np.ndarray], codes: str, scales: str, encoding: str) -> ov.Output:
    """float32 [N, nb*G] of codes whose values OpenVINO has a type for: Convert -> Multiply -> Reshape."""
    packed = load(codes)
    rows, blocks, width = packed.shape
    block = 8 * width // ENCODINGS[encoding].bits
    stored = _constant(packed, (rows, blocks, block), TABLE_TYPES[encoding], codes)
    scale = op.constant(load(scales).astype(np.float32).reshape(rows, blocks, 1))
    scale.set_friendly_name(scales)
    product = op.multiply(op.convert(stored, "f32"), scale)
    return op.reshape(product, op.constant(np.array([rows, blocks * block])), False).output(0)


def _typed(packed: np.ndarray, shape: tuple[int, ...], bits: int, name: str) -> Any:
    """A constant whose elements have 2, 4 or 8 bits, over bytes that are packed already."""
    return _constant(packed, shape, CODE_TYPES[bits], name)


def _constant(packed: np.ndarray, shape: tuple[int, ...], kind: str, name: str) -> Any:
    data = np.ascontiguousarray(packed).reshape(-1)
    tensor = ov.Tensor(data, ov.Shape(list(shape)), getattr(ov.Type, kind))
    constant = ov.op.Constant(tensor, shared_memory=False)
    constant.set_friendly_name(name)
    return constant


def read_matrices(path: Path) -> Mapping[str, StoredMatrix]:
    """Prefix of the Program's constants -> the matrix that stands in a saved model, of those that a node reads.

    One whose nodes are not in the form above is missing: what is computed is then not (code - zero point) * scale.
    """
    found = {}
    for node in ov.Core().read_model(path).get_ordered_ops():
        place = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
        if place is not None and (matrix := _matrix(node.input_value(place).get_node())) is not None:
            prefix, stored = matrix
            order = _order(node.input_value(0).get_node()) if place == 1 else None
            found[prefix] = replace(stored, order=order)
    return found


def _order(x: Any) -> np.ndarray | None:
    """Indices of the gather along the last axis that ``x`` comes from, if it comes from one."""
    while x.get_type_name() in ("Convert", "Pad"):
        x = x.input_value(0).get_node()
    if x.get_type_name() != "Gather":
        return None
    source, indices, axis = (value.get_node() for value in x.input_values())
    if source.get_type_name() == "Constant" or any(n.get_type_name() != "Constant" for n in (indices, axis)):
        return None
    return (
        np.array(indices.data)
        if int(axis.data) in (-1, source.get_output_partial_shape(0).rank.get_length() - 1)
        else None
    )


def _matrix(reshape: Any) -> tuple[str, StoredMatrix] | None:
    try:
        product, _ = _inputs(reshape, "Reshape")
        centred, scales = _inputs(product, "Multiply")
        if centred.get_type_name() == "Convert":
            return _table(centred, scales)
        converted, points = _inputs(centred, "Subtract")
        [codes] = _inputs(converted, "Convert")
        [points] = _inputs(points, "Convert")
    except ValueError:
        return None
    kinds = {getattr(ov.Type, name): bits for bits, name in CODE_TYPES.items()}
    bits = kinds.get(codes.get_element_type())
    if bits is None or any(node.get_type_name() != "Constant" for node in (codes, points, scales)):
        return None
    rows, blocks, block = codes.get_output_shape(0)
    unpacked = _unpacked(codes, bits).reshape(rows, blocks * block)
    zeros = np.broadcast_to(_unpacked(points, bits).reshape(points.get_output_shape(0)), (rows, blocks, 1))
    values = np.array(scales.data, np.float32).reshape(rows, blocks)
    return codes.get_friendly_name().removesuffix(CODES), StoredMatrix(unpacked, values, zeros[..., 0], bits, block)


def _table(converted: Any, scales: Any) -> tuple[str, StoredMatrix] | None:
    """Codes of a type whose values OpenVINO knows, straight from the conversion to the scales."""
    [codes] = _inputs(converted, "Convert")
    names = {getattr(ov.Type, kind): encoding for encoding, kind in TABLE_TYPES.items()}
    encoding = names.get(codes.get_element_type())
    if encoding is None or any(node.get_type_name() != "Constant" for node in (codes, scales)):
        return None
    rows, blocks, block = codes.get_output_shape(0)
    bits = ENCODINGS[encoding].bits
    unpacked = _unpacked(codes, bits).reshape(rows, blocks * block)
    held = np.array(scales.data, np.float32).reshape(rows, blocks)
    return codes.get_friendly_name().removesuffix(CODES), StoredMatrix(unpacked, held, None, bits, block, encoding)


def _inputs(node: Any, kind: str) -> list[Any]:
    """The nodes before one of the given kind. Raises ValueError for another kind."""
    if node.get_type_name() != kind:
        raise ValueError(kind)
    return [value.get_node() for value in node.input_values()]


def _unpacked(constant: Any, bits: int) -> np.ndarray:
    count = int(np.prod(constant.get_output_shape(0)))
    return unpack_bits(np.array(constant.data).view(np.uint8).reshape(1, -1), bits, count)
