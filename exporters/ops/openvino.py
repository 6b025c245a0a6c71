"""How the fused ops stand in an OpenVINO graph: one function per op, from a call of it to nodes of opset 15.

Each is shaped as the CPU plugin's own fusions look for it, so that the compiled model has RMS, RoPE and
ScaledDotProductAttentionWithKVCache nodes and FullyConnected nodes that read the codes as they are stored. An op
without a row here decomposes to its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from openvino import Output

#: Bits per code -> OpenVINO's type; the packed bytes are taken as they are, low bits first.
CODE_TYPES = {2: "u2", 4: "u4", 8: "u8"}
#: Encoding of exporters/encodings.py -> OpenVINO's type of the same values.
TABLE_TYPES = {"float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2", "float4_e2m1fn": "f4e2m1", "nf4": "nf4"}

#: cos(pi * x)^2 for |x| <= 1/2 as a polynomial in x^2, from the lowest: Chebyshev interpolation, 1e-8 from it.
COSINE_SQUARED = (0.999999994, -9.86960223, 32.469558, -42.7250567, 30.0837149, -12.9834423, 3.26385298)


class Call(Protocol):
    """One call of a fused op while it is translated."""

    def tensor(self, index: int) -> Output:
        """The argument as a value of the graph."""

    def value(self, index: int) -> Any:
        """The argument as a number, or None."""

    def text(self, index: int) -> str:
        """The argument as text."""

    def dequantised(self, index: int, bits: int) -> Output:
        """float32 [rows, columns or more] of the codes, scales and zero points that begin at argument ``index``."""

    def looked_up(self, index: int, encoding: str) -> Output:
        """The same of codes of a table and scales."""

    def state(self, index: int) -> tuple[Output, Callable[[Output], None]]:
        """The cache behind an argument as it was before this run, [B, KV, T, D] with the T positions written, and the
        function that takes what it becomes."""

    def once(self, key: str, make: Callable[[], Output]) -> Output:
        """The value that an earlier call made under that name, else a new one: what all layers share."""


def _constant(values: Any, dtype: Any = np.int32) -> Output:
    import openvino.opset15 as op

    return op.constant(np.asarray(values, dtype)).output(0)


def _like(x: Output, value: float) -> Output:
    """A number of the type of ``x``."""
    return _constant(value, x.get_element_type().to_dtype())


def _quantized_linear(call: Call) -> Sequence[Output]:
    """A product with codes -> Convert -> Subtract -> Multiply -> Reshape, which stays compressed when compiled."""
    weight = call.dequantised(1, call.value(5))
    return _product(call, weight, 4, call.value(6))


def _table_linear(call: Call) -> Sequence[Output]:
    """The same with codes of a float type or of nf4 -> Convert -> Multiply."""
    return _product(call, call.looked_up(1, call.text(4)), 3, call.value(5))


def _product(call: Call, weight: Output, bias: int, columns: int) -> Sequence[Output]:
    import openvino.opset15 as op

    x = call.tensor(0)
    surplus = weight.get_shape()[1] - columns
    if surplus:  # the last block reaches past the columns: what it holds there meets zeros
        rank = len(x.get_partial_shape())
        begin, end = [0] * rank, [0] * (rank - 1) + [surplus]
        x = op.pad(x, _constant(begin), _constant(end), "constant", _like(x, 0)).output(0)
    y = op.matmul(x, weight, False, True)
    return (y if call.value(bias) is None else op.add(y, call.tensor(bias))).outputs()


def _quantized_embedding(call: Call) -> Sequence[Output]:
    """Rows of the table that the tied head multiplies with: one constant for both."""
    return _rows(call, call.dequantised(1, call.value(4)), call.value(5))


def _table_embedding(call: Call) -> Sequence[Output]:
    return _rows(call, call.looked_up(1, call.text(3)), call.value(4))


def _rows(call: Call, table: Output, columns: int) -> Sequence[Output]:
    import openvino.opset15 as op

    rows = op.gather(table, call.tensor(0), _constant(0))
    if table.get_shape()[1] != columns:
        rows = op.slice(rows, _constant([0]), _constant([columns]), _constant([1]), _constant([2]))
    return rows.outputs()


def _normalised(x: Output, weight: Output, eps: float) -> Sequence[Output]:
    import openvino.opset15 as op

    dtype = x.get_element_type()
    y = op.convert(x, "f32")
    mean = op.reduce_mean(op.power(y, _constant(2, np.float32)), _constant([-1]), True)
    scale = op.divide(_constant(1, np.float32), op.sqrt(op.add(mean, _constant(eps, np.float32))))
    return op.multiply(op.convert(op.multiply(y, scale), dtype), weight).outputs()


def _rms_norm(call: Call) -> Sequence[Output]:
    return _normalised(call.tensor(0), call.tensor(1), call.value(2))


def _add_rms_norm(call: Call) -> Sequence[Output]:
    import openvino.opset15 as op

    total = op.add(call.tensor(0), call.tensor(1)).output(0)
    return [*_normalised(total, call.tensor(2), call.value(3)), total]


def _swiglu(call: Call) -> Sequence[Output]:
    import openvino.opset15 as op

    gate, up = op.split(call.tensor(0), _constant(-1), 2).outputs()
    return op.multiply(op.multiply(gate, op.sigmoid(gate)), up).outputs()


def _snake(call: Call) -> Sequence[Output]:
    import openvino.opset15 as op

    # The plugin's Sin is a scalar reference (half the time of an audio decoder). With x = frac(z/pi) - 1/2,
    # sin(z)^2 = cos(pi*x)^2: Horner's scheme in x^2 is two chains of what the plugin joins into one pass each.
    z = op.convert(call.tensor(0), "f32").output(0)
    turns = op.multiply(z, _constant(1 / math.pi, np.float32))
    part = op.subtract(op.floor_mod(turns, _constant(1, np.float32)), _constant(0.5, np.float32))
    square = op.power(part, _constant(2, np.float32))
    wave = _constant(COSINE_SQUARED[-1], np.float32)
    for coefficient in COSINE_SQUARED[-2::-1]:
        wave = op.add(op.multiply(wave, square), _constant(coefficient, np.float32)).output(0)
    return op.convert(op.add(wave, z), call.tensor(0).get_element_type()).outputs()


def _codebook_lookup(call: Call) -> Sequence[Output]:
    import openvino.opset15 as op

    codes, tables, size = call.tensor(0), call.tensor(1), call.value(2)
    rank, books = len(codes.get_partial_shape()), codes.get_partial_shape()[1].get_length()
    if books > 1:
        first = np.arange(0, books * size, size).reshape(1, books, *[1] * (rank - 2))
        codes = op.add(codes, op.convert(_constant(first), codes.get_element_type())).output(0)
    entries = op.gather(tables, codes, _constant(0))
    total = op.squeeze(entries, _constant([1])) if books == 1 else op.reduce_sum(entries, _constant([1]), False)
    return op.transpose(total, _constant([0, rank - 1, *range(1, rank - 1)])).outputs()


def _rope_angles(call: Call) -> Sequence[Output]:
    import openvino.opset15 as op

    at = call.tensor(2)
    halves = [op.gather(call.tensor(index), at, _constant(0)) for index in (0, 1)]
    return [op.concat([half, half], -1).output(0) for half in halves]


def _positions(last: Output, steps: Output) -> Output:
    """Positions int32 [B, S] of the S tokens whose newest is at ``last`` [B]."""
    import openvino.opset15 as op

    one = _constant(1)
    offsets = op.range(op.subtract(one, steps), one, one, "i32")
    return op.add(op.unsqueeze(last, _constant([1])), op.unsqueeze(offsets, _constant([0]))).output(0)


def _angles(table: Output, positions: Output) -> Output:
    """cos or sin [B, 1, S, D] from a table [C, D/2]."""
    import openvino.opset15 as op

    half = op.gather(table, positions, _constant(0))
    return op.unsqueeze(op.concat([half, half], -1), _constant([1])).output(0)


def _rotated(x: Output, cos: Output, sin: Output, width: int) -> Output:
    """RoPE of x [B, H, S, D] in the half-split form (Su et al., 2021)."""
    import openvino.opset15 as op

    first, second = op.variadic_split(x, _constant(3), _constant([width // 2, -1])).outputs()
    turned = op.concat([op.multiply(second, _like(x, -1)), first], -1)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin)).output(0)


def _hidden(positions: Output, length: Output, window: int, like: Output) -> Output:
    """[B, 1, S, T] to add to scores: 0 where a query may attend to one of the T positions, else the lowest number.

    A boolean mask would do, but takes the plugin's attention 3.6 times as long (2026.4, float32, a prompt of 200).
    """
    import openvino.opset15 as op

    slots = op.range(_constant(0), length, _constant(1), "i32")
    at = op.unsqueeze(positions, _constant([1, 3]))
    mask = op.less_equal(slots, at)
    if window > 0:
        mask = op.logical_and(mask, op.greater(slots, op.subtract(at, _constant(window))))
    lowest = np.finfo(like.get_element_type().to_dtype()).min
    return op.select(mask, _like(like, 0), _like(like, lowest)).output(0)


def _size(x: Output, axis: int) -> Output:
    import openvino.opset15 as op

    return op.squeeze(op.gather(op.shape_of(x, "i32"), _constant([axis]), _constant(0)), _constant([0])).output(0)


def _kv_attention(call: Call) -> Sequence[Output]:
    """Keys and values join the states by Concat; the CPU plugin appends in place and attends in one node."""
    import openvino.opset15 as op

    heads, kv_heads, scale, window, softcap = (call.value(index) for index in range(8, 13))
    states = [call.state(3), call.state(4)]
    width = states[0][0].get_partial_shape()[3].get_length()

    def rows(x: Output, count: int) -> Output:
        shape = _constant([0, 0, count, width])
        return op.transpose(op.reshape(x, shape, True), _constant([0, 2, 1, 3])).output(0)

    if call.value(1) is None:
        sizes = _constant([count * width for count in (heads, kv_heads, kv_heads)])
        query, key, value = op.variadic_split(call.tensor(0), _constant(-1), sizes).outputs()
    else:
        query, key, value = (call.tensor(index) for index in (0, 1, 2))
    query, key, value = rows(query, heads), rows(key, kv_heads), rows(value, kv_heads)

    last = call.tensor(5)
    positions = call.once("positions", lambda: _positions(last, _size(call.tensor(0), 1)))
    if call.value(6) is not None:
        tables = [call.tensor(index) for index in (6, 7)]  # families with windows have two pairs
        cos, sin = (
            call.once(f"angles {table.get_node().get_friendly_name()}", lambda t=table: _angles(t, positions))
            for table in tables
        )
        query, key = _rotated(query, cos, sin, width), _rotated(key, cos, sin, width)

    present = []
    for (past, become), new in zip(states, (key, value), strict=True):
        joined = op.concat([past, new], 2).output(0)
        become(joined)
        present.append(joined)
    mask = call.once(f"hidden {window}", lambda: _hidden(positions, _size(present[0], 2), window, query))
    groups = heads // kv_heads
    keys, values = (_repeated(x, heads, groups, width) for x in present)
    if softcap > 0:
        out = _capped_attention(query, keys, values, mask, scale, softcap)
    else:
        out = op.scaled_dot_product_attention(query, keys, values, mask, _like(query, scale), False)
    joined = op.reshape(op.transpose(out, _constant([0, 2, 1, 3])), _constant([0, 0, heads * width]), True)
    return [joined.output(0), *present]


def _repeated(x: Output, heads: int, groups: int, width: int) -> Output:
    """[B, KV, T, D] -> [B, H, T, D], each head as often as queries share it."""
    import openvino.opset15 as op

    if groups == 1:
        return x
    wide = op.unsqueeze(x, _constant(-3))
    bigger = op.broadcast(wide, _constant([1, 1, groups, 1, 1]), None, "BIDIRECTIONAL")
    return op.reshape(bigger, _constant([0, heads, -1, width]), True).output(0)


def _capped_attention(
    query: Output, keys: Output, values: Output, mask: Output, scale: float, softcap: float
) -> Output:
    """With softcap * tanh(scores / softcap), which the fused operator does not have."""
    import openvino.opset15 as op

    cap = _like(query, softcap)
    scores = op.multiply(op.matmul(query, keys, False, True), _like(query, scale))
    scores = op.multiply(cap, op.tanh(op.divide(scores, cap)))
    weights = op.softmax(op.add(scores, mask), -1)
    return op.matmul(weights, values, False, False).output(0)


def _group_norm(call: Call) -> Sequence[Output]:
    """MVN over [B, groups, rest] between reshapes to constant targets."""
    import openvino.opset15 as op

    x, groups, eps = call.tensor(0), call.value(1), call.value(4)
    shape = [size.get_length() if size.is_static else -1 for size in x.get_partial_shape()]
    settled = sum(size < 0 for size in shape[1:]) <= 1
    back = _constant([0, *shape[1:]]) if settled else op.shape_of(x, "i32").output(0)
    flat = op.reshape(x, _constant([0, groups, -1]), True)
    y = op.reshape(op.mvn(flat, _constant([2]), True, eps, "INSIDE_SQRT"), back, True)
    wide = _constant([1, -1, *[1] * (len(shape) - 2)])
    for index, join in ((2, op.multiply), (3, op.add)):
        if call.value(index) is not None:
            y = join(y, op.reshape(call.tensor(index), wide, False))
    return y.outputs()


#: operators of PyTorch whose own translation is worse than what OpenVINO offers
ATEN_LOWERINGS: Mapping[str, Callable[[Call], Sequence[Output]]] = {"group_norm": _group_norm}

LOWERINGS: Mapping[str, Callable[[Call], Sequence[Output]]] = {
    "add_rms_norm": _add_rms_norm,
    "codebook_lookup": _codebook_lookup,
    "kv_attention": _kv_attention,
    "quantized_embedding": _quantized_embedding,
    "quantized_linear": _quantized_linear,
    "rms_norm": _rms_norm,
    "rope_angles": _rope_angles,
    "snake": _snake,
    "swiglu": _swiglu,
    "table_embedding": _table_embedding,
    "table_linear": _table_linear,
}
