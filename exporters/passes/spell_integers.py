"""Multiplies rounded inputs as the integers that they are, where the weights are integers with one scale a row.

Given:  MatMulNBits(Rounded(x), codes, scales, zeros, bias) {bits: 8}   each row of the matrix with one scale and zero
Result: c = QuantizeLinear(x, s, 128)                                   s [.., 1] a static number or each row's own
        y = MatMulIntegerToFloat(c, codes [K, N], 1, scales [N], 128, zeros) * s + bias
with s among the operator's inputs where it is static. Rows that have zero points of their own take one more term:
        y = (MatMulInteger(c, codes, 128, zeros) - z * sum of (codes - zeros) over K) * s * scales
and what else reads the rounded input gets (c - 128 - z) * s.

The codes are bit for bit those of ``edge::quantize_activation``, and sums of their products are exact in int32, so the
result is rounded two or three times in all instead of once for each column.

Both sides are unsigned for the sake of that. ONNX Runtime chooses a kernel by the two signs (onnxruntime/core/mlas/lib,
platform.cpp and qgemm.h): unsigned by signed is vpmaddubsw on x86 without VNNI, where the sum of a pair saturates at 16
bits, and signed by either has no x86 kernel before AVX-VNNI-INT8. Unsigned by unsigned is widened to 16 bits first on
x86 (vpmaddwd; vpdpbuud where there is AVX-VNNI-INT8), and udot, ummla or a widening product on Arm: all exact.
WebAssembly's relaxed dot product is taken only where a test at run time finds that it does not saturate.

Against float products of the two 4-bit planes of split_bytes, dynamic scales, one thread of a Xeon with AVX-512
(1.31): one row of x with 4864 x 896 takes 0.31 of the time and with 896 x 9728 0.41 of it, 64 rows 0.37 and 0.43, 512
rows 0.50 and 0.61; with static scales 0.27 to 0.46. `python -m tools.bench_integers` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.ops import BUILD
from exporters.ops.quantize_activation import EPSILON, FORMATS
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.editor import Editor
from exporters.passes.initializers import lazy_initializer
from exporters.passes.mark_origins import NODE

#: What is appended to a matrix's name for its codes [K, N], and its scales, zero points and sums of codes [N].
CODES, SCALES, ZEROS, SUMS = ".integers", ".integer_scales", ".integer_zeros", ".integer_sums"
#: Columns up to which any sum of products fits int32.
MOST_COLUMNS = (2**31 - 1) // (128 * 255)
FLOAT, INT32, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8
#: Operators that multiply integers by integers -> the place of the weight's zero points among their inputs.
INTEGER_PRODUCTS = {"MatMulInteger": 3, "MatMulIntegerToFloat": 5}
#: What makes an int8 code unsigned.
OFFSET = 128
INT8 = FORMATS["int8"]


def spell_integers(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in list(model.graph):
        if node.domain == BUILD and node.op_type == "Rounded":
            _spell(model, node)
    model.graph.opset_imports.pop(BUILD, None)
    drop_unused(model)  # the codes as they were packed


def _spell(model: ir.Model, node: ir.Node) -> None:
    result = node.outputs[0]
    products = [user for user in result.consumers() if _is_integer(user)]
    others = len(products) < len(result.consumers()) or result.is_graph_output()
    if not others:
        node.metadata_props.pop(NODE, None)  # its value is nowhere: the codes are not it
    add = Editor(model, node)
    codes = _static(add, node) if node.attributes["scale"].as_float() else _dynamic(add, node)
    for product in products:
        _multiply(model, product, codes)
    if others:
        add.replace(add.cast(codes.values(add), result.dtype))
    else:
        model.graph.remove(node, safe=True)


@dataclass(frozen=True)
class _Codes:
    """A rounded input: (codes - OFFSET - zero) * scale.

    Attributes:
        codes: uint8 [..., K].
        scale: float32 [..., 1], or [] where it is static.
        zero: whole numbers in float32, likewise; None for 0.
        fixed: the zero point of all rows where it is known.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    fixed: int | None

    def values(self, add: Editor) -> ir.Value:
        """float32 [..., K]."""
        shape = self.codes.shape
        centred = add("Sub", [add.cast(self.codes, FLOAT), _number(add, OFFSET)], {}, FLOAT, shape)
        if self.zero is not None:
            centred = add("Sub", [centred, self.zero], {}, FLOAT, shape)
        return add("Mul", [centred, self.scale], {}, FLOAT, shape)


def _static(add: Editor, node: ir.Node) -> _Codes:
    x = add.cast(node.inputs[0], FLOAT)
    scale, zero = _number(add, node.attributes["scale"].as_float()), node.attributes["zero_point"].as_int()
    if node.attributes["symmetric"].as_int() or not zero:
        codes = add("QuantizeLinear", [x, scale, add.constant(np.array(OFFSET, np.uint8))], {}, UINT8, x.shape)
        return _Codes(codes, scale, None, 0)
    point = _number(add, zero)
    return _Codes(_rounded(add, x, scale, point), scale, point, zero)


def _dynamic(add: Editor, node: ir.Node) -> _Codes:
    """Each row's own scale, as compressed-tensors takes it."""
    x = add.cast(node.inputs[0], FLOAT)
    last, column = add.constant(np.array([-1], np.int64)), [*x.shape[:-1], 1]
    nothing = _number(add, 0)

    def reached(operator: str, value: ir.Value) -> ir.Value:
        return add(operator, [value, last], {"keepdims": 1}, FLOAT, column)

    def scale_of(span: ir.Value, steps: float) -> ir.Value:
        scale = add("Div", [span, _number(add, steps)], {}, FLOAT, column)
        empty = add("Equal", [scale, nothing], {}, ir.DataType.BOOL, column)
        return add("Where", [empty, _number(add, EPSILON), scale], {}, FLOAT, column)

    if node.attributes["symmetric"].as_int():
        largest = reached("ReduceMax", add("Abs", [x], {}, FLOAT, x.shape))
        scale = scale_of(largest, (INT8.high - INT8.low) / 2)
        rows = [size for size in x.shape[:-1] if size != 1]
        if len(rows) > 1 or len(x.shape) < 2:
            return _Codes(_rounded(add, x, scale, None), scale, None, 0)
        return _Codes(_by_row(add, x, scale), scale, None, 0)
    least = add("Min", [reached("ReduceMin", x), nothing], {}, FLOAT, column)
    most = add("Max", [reached("ReduceMax", x), nothing], {}, FLOAT, column)
    scale = scale_of(add("Sub", [most, least], {}, FLOAT, column), INT8.high - INT8.low)
    below = add("Sub", [_number(add, INT8.low), add("Div", [least, scale], {}, FLOAT, column)], {}, FLOAT, column)
    zero = add("Round", [_clipped(add, below)], {}, FLOAT, column)
    return _Codes(_rounded(add, x, scale, zero), scale, zero, None)


def _by_row(add: Editor, x: ir.Value, scale: ir.Value) -> ir.Value:
    """QuantizeLinear along the one axis of rows: the division, the rounding and the clamp in one pass over memory."""
    lead = list(x.shape[:-1])
    axis = next((i for i, size in enumerate(lead) if size != 1), len(lead) - 1)
    flat = add.reshape(scale, [lead[axis]], [-1])
    count = add("Shape", [flat], {}, ir.DataType.INT64, [1])
    filling = {"value": ir.tensor(np.array([OFFSET], np.uint8))}
    points = add("ConstantOfShape", [count], filling, UINT8, [lead[axis]])
    return add("QuantizeLinear", [x, flat, points], {"axis": axis}, UINT8, x.shape)


def _rounded(add: Editor, x: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
    """The same step by step; a zero point is added before rounding, where QuantizeLinear adds it behind."""
    scaled = add("Div", [x, scale], {}, FLOAT, x.shape)
    if zero is not None:
        scaled = add("Add", [scaled, zero], {}, FLOAT, x.shape)
    whole = add("Round", [_clipped(add, scaled)], {}, FLOAT, x.shape)
    return add.cast(add("Add", [whole, _number(add, OFFSET)], {}, FLOAT, x.shape), UINT8)


def _clipped(add: Editor, value: ir.Value) -> ir.Value:
    return add("Clip", [value, _number(add, INT8.low), _number(add, INT8.high)], {}, FLOAT, value.shape)


def _number(add: Editor, value: float) -> ir.Value:
    return add.constant(np.array(value, np.float32))


def _is_integer(node: ir.Node) -> bool:
    """Whether a node is a product with a matrix of 8-bit codes, each row of which has one scale and zero point."""
    if node.op_type != "MatMulNBits" or node.attributes["bits"].as_int() != 8:
        return False
    tables = [value.const_value.numpy() for value in node.inputs[2:4] if value is not None]
    fits = node.attributes["K"].as_int() <= MOST_COLUMNS
    return fits and all(bool((table == table[:, :1]).all()) for table in tables)


def _multiply(model: ir.Model, node: ir.Node, x: _Codes) -> None:
    """Puts the integer product in the place of a MatMulNBits."""
    codes, scales, zeros = (*node.inputs, None)[1:4]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    rows, columns = codes.const_value.shape[0], node.attributes["K"].as_int()
    shape, prefix = node.outputs[0].shape, codes.name.removesuffix(".codes")
    add = Editor(model, node)
    make = partial(lazy_initializer, model)
    weight = make(prefix + CODES, UINT8, (columns, rows), partial(_turned, codes.const_value, columns))
    by = make(prefix + SCALES, FLOAT, (rows,), partial(_first, scales.const_value))
    middle = add.constant(np.array(OFFSET, np.uint8))
    points = middle if zeros is None else make(prefix + ZEROS, UINT8, (rows,), partial(_first, zeros.const_value))
    if x.fixed is None:
        total = add("MatMulInteger", [x.codes, weight, middle, points], {}, INT32, shape)
        load = partial(_sums, codes.const_value, None if zeros is None else zeros.const_value, columns)
        sums = make(prefix + SUMS, INT32, (rows,), load)
        shift = add("Mul", [add.cast(x.zero, INT32), sums], {}, INT32, shape)
        y = add.cast(add("Sub", [total, shift], {}, INT32, shape), FLOAT)
        y = add("Mul", [add("Mul", [y, x.scale], {}, FLOAT, shape), by], {}, FLOAT, shape)
    else:
        static = not x.scale.shape
        at = add.constant(np.array(OFFSET + x.fixed, np.uint8))
        given = [x.codes, weight, x.scale if static else _number(add, 1), by, at, points]
        y = add("MatMulIntegerToFloat", given, {}, FLOAT, shape, domain="com.microsoft")
        if not static:
            y = add("Mul", [y, x.scale], {}, FLOAT, shape)
    y = add.cast(y, node.outputs[0].dtype)
    if bias is not None:
        y = add("Add", [y, bias], {}, y.dtype, shape)
    add.replace(y)


def _turned(codes: ir.TensorProtocol, columns: int) -> np.ndarray:
    """uint8 [K, N]."""
    held = codes.numpy()
    return held.reshape(held.shape[0], -1)[:, :columns].T


def _first(table: ir.TensorProtocol) -> np.ndarray:
    return table.numpy()[:, 0]


def _sums(codes: ir.TensorProtocol, zeros: ir.TensorProtocol | None, columns: int) -> np.ndarray:
    """int32 [N]: of each row's codes minus its zero point."""
    points = np.int32(OFFSET) if zeros is None else _first(zeros).astype(np.int32)
    return _turned(codes, columns).sum(0, dtype=np.int32) - points * np.int32(columns)
