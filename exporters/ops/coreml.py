"""Core ML's column: fused op -> MIL, the intermediate language of an ``.mlpackage``.

Two layouts of the language model's activations. *Rows* are [B, S, K] and a projection is a matrix product. *Channels*
are [B, K, 1, S] and a projection is a 1x1 convolution: the form that Apple asks for where the Neural Engine is to run
it ("Deploying Transformers on the Apple Neural Engine", 2022). A lowering computes in its scope's layout and hands out
rows; what was computed in channels is remembered, so that the next lowering continues from there, and rows that nobody
reads are dead code.

A node of the Program is called ``node_<its name>``, its second result ``node_<name>__1``, and what is computed on the
way ``node_<name>__<what>``: no name of the vendor's begins so.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters import ops
from exporters.blocks import unpack_bits
from exporters.encodings import ENCODINGS, values

NAMESPACE = "edge_coreml"
PREFIX = "node_"

#: Added to the score of a slot that a query may not see: its weight is exactly 0, and the sum is finite in float16.
MASKED = -3e4


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``edge::kv_attention`` over caches [B, kv_heads, C', D'] that may be longer and wider than what is written."""
    width = query.shape[2] // (heads if key is not None else heads + 2 * kv_heads)
    held = [past[..., :width] for past in (past_key, past_value)]
    out, *new = ops.kv_attention.reference(
        query, key, value, *held, last, cos, sin, heads, kv_heads, scale, window, softcap
    )
    present = [past.clone() for past in (past_key, past_value)]
    for whole, part in zip(present, new, strict=True):
        whole[..., :width] = part
    return out, *present


@attention.register_fake
def _(query, key, value, past_key, past_value, last, cos, sin, heads, kv_heads, *numbers):
    parts = heads if key is not None else heads + 2 * kv_heads
    out = query.new_empty(*query.shape[:-1], query.shape[-1] // parts * heads)
    return out, torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, a float projection of the language model."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::group_norm", mutates_args=())
def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalisation over [B, C, ...]; the vendor's own translation needs every size known."""
    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


@group_norm.register_fake
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::gelu", mutates_args=())
def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU; the vendor's own translation passes over the keyword that asks for the one by tanh."""
    return torch.nn.functional.gelu(x, approximate=approximate)


@gelu.register_fake
def _(x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return gelu(x, approximate)


#: PyTorch's word for how GELU is computed -> Core ML's
_GELU_MODES = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias)


def _float_group_norm(x: Tensor, groups: int, weight=None, bias=None, eps: float = 1e-5, cudnn_enabled=True) -> Tensor:
    return group_norm(x, groups, weight, bias, eps)


def decompositions(language_model: bool) -> dict[Any, Callable[..., Any]]:
    """Operators that are re-expressed before conversion: PyTorch's own where the vendor's translation falls short, and
    fused ops without a lowering here, by their reference."""
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {
        op.overload: op.reference
        for name, op in ops.REGISTRY.items()
        if f"{ops.NAMESPACE}::{name}" not in LOWERINGS and op is not ops.kv_attention  # which `attention` stands for
    }
    table[aten.group_norm.default] = _float_group_norm
    table[aten.gelu.default] = _gelu
    if language_model:
        table[aten.linear.default] = _float_linear
    return table


def whole_quotient(x: int, y: int) -> int:
    """``x // y`` of sizes, which the vendor's own translation turns into a float."""
    return x // y


#: functions in the graph that stand for others in the vendor's table
RESPELLED: Mapping[Any, Callable[..., Any]] = {operator.floordiv: whole_quotient}


# --- the scope of one conversion ----------------------------------------------------------------------------------


@dataclass
class Scope:
    """What the lowerings of one function share.

    Attributes:
        channels: the layout, see above.
        constants: placeholder of the exported graph -> name of the Program's constant.
        made: what several nodes use: dequantised matrices, masks, angles.
        twins: id of a value in rows -> (that value, the same in channels).
        node: name of the node that is being lowered.
    """

    channels: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)
    made: dict[Any, Any] = field(default_factory=dict)
    twins: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    node: str = ""

    @property
    def axis(self) -> int:
        """The axis of the features."""
        return 1 if self.channels else -1

    def enter(self, x: Any) -> Any:
        """``x``, given in rows, in the layout of the scope."""
        if not self.channels:
            return x
        if id(x) not in self.twins:
            self.twins[id(x)] = x, mb.expand_dims(x=mb.transpose(x=x, perm=[0, 2, 1]), axes=[2])
        return self.twins[id(x)][1]

    def leave(self, y: Any) -> Any:
        """``y`` in rows."""
        if not self.channels:
            return y
        rows = mb.transpose(x=mb.squeeze(x=y, axes=[2]), perm=[0, 2, 1])
        self.twins[id(rows)] = rows, y
        return rows

    def vector(self, values: Any) -> np.ndarray:
        """A weight [K] that is multiplied with features."""
        return values.val.reshape(1, -1, 1, 1) if self.channels else values.val

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


_SCOPE: ContextVar[Scope] = ContextVar("scope of a Core ML conversion")


@contextmanager
def lowering(scope: Scope) -> Iterator[None]:
    """Within, ``coremltools.convert`` takes graphs with fused ops."""
    _register()
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


@cache
def _register() -> None:
    """Enters every lowering in the vendor's table of operators, its official hook."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def entry(lower: Callable[..., Any]) -> Callable[[Any, Any], None]:
        def convert(context: Any, node: Any) -> None:
            scope = _SCOPE.get()
            scope.node = node.name
            context.add(lower(scope, node.name, *_get_inputs(context, node)), torch_name=node.name)

        return convert

    for name, lower in LOWERINGS.items():
        convert = entry(lower)
        convert.__name__ = name
        register_torch_op(convert)


class _Builder:
    """The vendor's builder; an operator without a name of its own is called after the node that it belongs to."""

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        from coremltools.converters.mil.mil import Builder

        def make(**arguments: Any) -> Any:
            return getattr(Builder, operator)(**{"name": f"{_SCOPE.get().node}__{operator}"} | arguments)

        return make


mb = _Builder()


# --- matrices -----------------------------------------------------------------------------------------------------


def matrix_name(prefix: str) -> str:
    """Name of the MIL op that dequantises the Program's matrix ``prefix``."""
    return "matrix_" + re.sub(r"\W", "_", prefix)


def _matrix(scope: Scope, codes: Any, scales: Any, zeros: Any, bits: int, trailing: int) -> Any:
    """The student's own codes, scales and zero points as a compressed constant [N, K', 1...].

    Symmetric codes are stored signed, which is the same number less 2^(bits-1); the others as they are. The smallest
    field of a compressed constant has 4 bits.
    """

    def make() -> Any:
        from coremltools.converters.mil.mil import types

        rows, blocks, width = codes.val.shape
        data = unpack_bits(codes.val.reshape(rows, -1), bits, width * 8 // bits * blocks)
        kind = types.nptype_from_builtin(types.string_to_builtin(f"{'int' if zeros is None else 'uint'}{max(bits, 4)}"))
        offset = None
        if zeros is None:
            data = data.astype(np.int16) - 2 ** (bits - 1)
        else:
            offset = _with_axes(unpack_bits(zeros.val, bits, blocks), trailing).astype(kind)
        prefix = scope.constants.get(codes.name, codes.name).removesuffix(".codes")
        return mb.constexpr_blockwise_shift_scale(
            data=_with_axes(data, trailing).astype(kind),
            scale=_with_axes(scales.val, trailing),
            offset=offset,
            name=matrix_name(prefix),
        )

    return scope.once(("matrix", codes.name), make)


def _table(scope: Scope, codes: Any, scales: Any, encoding: str, trailing: int) -> Any:
    """Codes that stand for the values of a table, as indices into it, and scales on top: [N, K', 1...]."""

    def make() -> Any:
        from coremltools.converters.mil.mil import types

        rows, blocks, width = codes.val.shape
        bits = ENCODINGS[encoding].bits
        indices = unpack_bits(codes.val.reshape(rows, -1), bits, width * 8 // bits * blocks)
        kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
        name = matrix_name(scope.constants.get(codes.name, codes.name).removesuffix(".codes"))
        table = np.nan_to_num(values(encoding)).reshape(*[1] * (2 + trailing), -1, 1)  # no code is NaN
        looked_up = mb.constexpr_lut_to_dense(
            indices=_with_axes(indices, trailing).astype(kind), lut=table, name=f"{name}_values"
        )
        scale = _with_axes(scales.val, trailing)
        return mb.constexpr_blockwise_shift_scale(data=looked_up, scale=scale, name=name)

    return scope.once(("matrix", codes.name), make)


def _with_axes(values: np.ndarray, trailing: int) -> np.ndarray:
    return values.reshape(*values.shape, *[1] * trailing)


def _quantized_linear(scope, name, x, codes, scales, zeros, bias, bits, columns):
    def matrix(trailing: int) -> Any:
        return _matrix(scope, codes, scales, zeros, int(bits.val), trailing)

    return _compressed_product(scope, name, x, codes, matrix, bias, columns)


def _table_linear(scope, name, x, codes, scales, bias, encoding, columns):
    def matrix(trailing: int) -> Any:
        return _table(scope, codes, scales, encoding, trailing)

    return _compressed_product(scope, name, x, codes, matrix, bias, columns)


def _compressed_product(scope, name, x, codes, matrix, bias, columns):
    looked_up = ("matrix", codes.name) in scope.made  # by the embedding, in two dimensions: stored once for both
    inner = Scope() if scope.channels and looked_up else scope
    weight = matrix(2 * inner.channels)
    x = _padded(inner.enter(x), inner.axis, weight.shape[1] - int(columns.val))
    return inner.leave(_product(inner, name, x, weight, bias))


def _product(scope: Scope, name: str, x: Any, weight: Any, bias: Any) -> Any:
    multiply = mb.conv if scope.channels else mb.linear
    options = {} if bias is None else {"bias": bias}
    return multiply(x=x, weight=weight, name=name, **options)


def _padded(x: Any, axis: int, extra: int) -> Any:
    """``x`` with ``extra`` zeros at the end of an axis: what a matrix holds past its columns must not count."""
    if not extra:
        return x
    pad = np.zeros((x.rank, 2), np.int32)
    pad[axis, 1] = extra
    return mb.pad(x=x, pad=pad.reshape(-1), mode="constant", constant_val=_like(x, 0))


def _linear(scope, name, x, weight, bias):
    held = weight.val.reshape(*weight.shape, 1, 1) if scope.channels else weight
    return scope.leave(_product(scope, name, scope.enter(x), held, bias))


def _quantized_embedding(scope, name, ids, codes, scales, zeros, bits, columns):
    """Rows of the compressed constant itself, which the tied head multiplies with too."""
    return _compressed_rows(name, ids, _matrix(scope, codes, scales, zeros, int(bits.val), 0), columns)


def _table_embedding(scope, name, ids, codes, scales, encoding, columns):
    return _compressed_rows(name, ids, _table(scope, codes, scales, encoding, 0), columns)


def _compressed_rows(name, ids, table, columns):
    whole = table.shape[1] == int(columns.val)
    rows = mb.gather(x=table, indices=ids, axis=0, name=name if whole else f"{name}__whole")
    if whole:
        return rows
    return mb.slice_by_index(
        x=rows, begin=[0, 0, 0], end=[0, 0, int(columns.val)], end_mask=[True, True, False], name=name
    )


# --- norms, activations, lookups ----------------------------------------------------------------------------------


def _normalised(scope: Scope, name: str, x: Any, weight: Any, eps: Any) -> Any:
    """RMSNorm that cannot overflow in float16: rows are divided by their largest value m before they are squared.

    x / sqrt(mean(x^2) + eps) == y / sqrt(mean(y^2) + (sqrt(eps) / m)^2) with y = x / m, for any m > 0.
    """
    root = _like(x, math.sqrt(eps.val))
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[scope.axis], keep_dims=True, name=f"{name}__largest")
    largest = mb.maximum(x=largest, y=root)
    y = mb.real_div(x=x, y=largest)
    share = mb.real_div(x=root, y=largest)
    mean = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[scope.axis], keep_dims=True, name=f"{name}__mean_square")
    inverse = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=share, y=share)), name=f"{name}__inverse")
    return mb.mul(x=mb.mul(x=y, y=inverse), y=scope.vector(weight), name=name)


def _like(x: Any, value: float) -> np.generic:
    """``value`` as a constant of the type that ``x`` has: float32 but for graphs that are float16 themselves."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(x.dtype)(value)


def _rms_norm(scope, name, x, weight, eps):
    return scope.leave(_normalised(scope, name, scope.enter(x), weight, eps))


def _add_rms_norm(scope, name, x, residual, weight, eps):
    total = mb.add(x=scope.enter(x), y=scope.enter(residual), name=f"{name}__1")
    return scope.leave(_normalised(scope, name, total, weight, eps)), scope.leave(total)


def _swiglu(scope, name, joined):
    gate, up = mb.split(x=scope.enter(joined), num_splits=2, axis=scope.axis)
    return scope.leave(mb.mul(x=mb.silu(x=gate), y=up, name=name))


def _group_norm(scope, name, x, groups, weight, bias, eps):
    groups = int(groups.val)
    known = [int(size) if isinstance(size, (int, np.integer)) else -1 for size in x.shape]
    if known.count(-1) > 1:
        raise ValueError(f"{name}: a group normalisation with more than one flexible dimension")
    # Of the flexible size only its place is known: the grouped tensor keeps it as the batch or hides it in the rest.
    flat = [known[0], groups, -1 if -1 in known[1:] else math.prod(known[1:]) // groups]
    normed = mb.layer_norm(x=mb.reshape(x=x, shape=flat), axes=[2], epsilon=np.float32(eps.val))
    normed = mb.reshape(x=normed, shape=known, name=name if weight is None else f"{name}__normed")
    if weight is None:
        return normed
    column = (1, -1, *[1] * (x.rank - 2))
    scaled = mb.mul(x=normed, y=weight.val.reshape(column), name=name if bias is None else f"{name}__scaled")
    return scaled if bias is None else mb.add(x=scaled, y=bias.val.reshape(column), name=name)


def _snake(scope, name, z):
    wave = mb.sin(x=z)
    return mb.add(x=z, y=mb.mul(x=wave, y=wave), name=name)


def _codebook_lookup(scope, name, codes, tables, size):
    books, rank = codes.shape[1], codes.rank
    offsets = np.arange(books, dtype=np.int32).reshape(1, books, *[1] * (rank - 2)) * np.int32(size.val)
    rows = mb.add(x=codes, y=offsets) if books > 1 else codes
    entries = mb.gather(x=tables, indices=rows, axis=0)
    total = mb.reduce_sum(x=entries, axes=[1]) if books > 1 else mb.squeeze(x=entries, axes=[1])
    return mb.transpose(x=total, perm=[0, rank - 1, *range(1, rank - 1)], name=name)


def _rope_angles(scope, name, cos, sin, positions):
    halves = [mb.gather(x=table, indices=positions, axis=0) for table in (cos, sin)]
    names = (name, f"{name}__1")
    return tuple(mb.concat(values=[half, half], axis=-1, name=n) for half, n in zip(halves, names, strict=True))


def _cdist(scope, name, x, y, *options):
    """Euclidean distances by the product, as PyTorch does it for large inputs; y is a constant table."""
    squares = mb.reduce_sum(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
    product = mb.matmul(x=mb.mul(x=x, y=np.float32(-2)), y=y, transpose_y=True)
    total = mb.add(x=mb.add(x=squares, y=product), y=np.square(y.val).sum(-1, dtype=np.float32)[None])
    return mb.sqrt(x=mb.maximum(x=total, y=np.float32(0)), name=name)


def _whole_quotient(scope, name, x, y):
    return mb.floor_div(x=x, y=y, name=name)


# --- attention ----------------------------------------------------------------------------------------------------


def _attention(scope, name, query, key, value, past_key, past_value, last, cos, sin, heads, kv_heads, *numbers):
    """Writes the new slots of both caches by ``slice_update`` and attends with ``scaled_dot_product_attention``.

    The query heads of one key head become rows of one product, so that no key is repeated in memory.
    """
    heads, kv_heads = int(heads.val), int(kv_heads.val)
    scale, window, softcap = (number.val for number in numbers)
    steps, capacity = query.shape[1], past_key.shape[2]
    if key is None:
        width = query.shape[2] // (heads + 2 * kv_heads)
        parts = _heads(scope, query, heads + 2 * kv_heads, width)
        turning, v = mb.split(x=parts, split_sizes=[heads + kv_heads, kv_heads], axis=1)
    else:
        width = query.shape[2] // heads
        q, k, v = (_heads(scope, x, n, width) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
        turning = mb.concat(values=[q, k], axis=1)
    if cos is not None:
        turning = _rotated(turning, *_angles(scope, last, cos, sin, steps))
    q, k = mb.split(x=turning, split_sizes=[heads, kv_heads], axis=1)

    if past_key.dtype != k.dtype:  # a float16 graph: the vendor hands states out as float32
        past_key, past_value = (mb.cast(x=past, dtype="fp16") for past in (past_key, past_value))
    caches = [
        _written(scope, past, new, last, f"{name}__{i}")
        for i, (past, new) in enumerate(((past_key, k), (past_value, v)), 1)
    ]
    wide = past_key.shape[3]
    factor = scale if softcap else scale * math.sqrt(wide)  # the fused op divides by the root itself
    if not math.isclose(factor, 1):
        q = mb.mul(x=q, y=_like(q, factor))
    group = heads // kv_heads
    q = _padded(mb.reshape(x=q, shape=[1, kv_heads, group * steps, width]), 3, wide - width)
    mask = scope.once(
        ("mask", last.name, steps, capacity, window, group),
        lambda: _mask(scope, q, last, steps, capacity, window, group),
    )
    out = _chunked(scope, q, *caches, mask, softcap)
    if wide != width:
        out = mb.slice_by_index(x=out, begin=[0] * 4, end=[0, 0, 0, width], end_mask=[True, True, True, False])
    out = mb.reshape(x=out, shape=[1, heads, steps, width])
    return _joined(scope, out, name), *caches


def _heads(scope: Scope, x: Any, count: int, width: int) -> Any:
    """[1, count, S, width] from rows or channels of ``count`` heads."""
    steps = x.shape[1]
    if scope.channels:
        return mb.transpose(x=mb.reshape(x=scope.enter(x), shape=[1, count, width, steps]), perm=[0, 1, 3, 2])
    return mb.transpose(x=mb.reshape(x=x, shape=[1, steps, count, width]), perm=[0, 2, 1, 3])


def _joined(scope: Scope, out: Any, name: str) -> Any:
    """The inverse of ``_heads``, handed out in rows."""
    _, count, steps, width = out.shape
    if scope.channels:
        turned = mb.transpose(x=out, perm=[0, 1, 3, 2])
        return scope.leave(mb.reshape(x=turned, shape=[1, count * width, 1, steps], name=name))
    return mb.reshape(x=mb.transpose(x=out, perm=[0, 2, 1, 3]), shape=[1, steps, count * width], name=name)


def _positions(scope: Scope, last: Any, steps: int) -> Any:
    """int32 [S]: positions of the S tokens whose newest is at ``last`` [1]."""
    offsets = np.arange(1 - steps, 1, dtype=np.int32)
    return scope.once(("positions", last.name, steps), lambda: mb.add(x=last, y=offsets))


def _angles(scope: Scope, last: Any, cos: Any, sin: Any, steps: int) -> tuple[Any, Any]:
    """cos and sin [S, D/2] at the positions of the tokens; they broadcast over the heads."""
    at = _positions(scope, last, steps)

    def make() -> tuple[Any, Any]:
        return tuple(mb.gather(x=table, indices=at, axis=0) for table in (cos, sin))

    return scope.once(("angles", cos.name, sin.name, last.name, steps), make)


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    """RoPE in the half-split form on [1, heads, S, D]."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    return mb.concat(
        values=[
            mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin)),
        ],
        axis=-1,
    )


def _written(scope: Scope, past: Any, new: Any, last: Any, name: str) -> Any:
    """The cache with the new rows at their positions; columns beyond their width stay as they are."""
    _, kv_heads, steps, width = new.shape

    def bounds() -> tuple[Any, Any]:
        start = mb.add(x=last, y=np.int32(1 - steps))
        stop = mb.add(x=last, y=np.int32(1))
        begin = mb.concat(values=[np.zeros(2, np.int32), start, np.zeros(1, np.int32)], axis=0)
        ends = (np.array([1, kv_heads], np.int32), stop, np.array([width], np.int32))
        return begin, mb.concat(values=ends, axis=0)

    begin, end = scope.once(("bounds", last.name, steps, kv_heads, width), bounds)
    return mb.slice_update(x=past, update=new, begin=begin, end=end, name=name)


def _mask(scope: Scope, like: Any, last: Any, steps: int, capacity: int, window: int, group: int) -> Any:
    """[1, 1, group*S, C]: 0 where a query may look, MASKED elsewhere."""
    at = mb.expand_dims(x=_positions(scope, last, steps), axes=[1])
    slots = np.arange(capacity, dtype=np.int32)[None]
    hidden = mb.greater(x=slots, y=at)
    if window > 0:
        hidden = mb.logical_or(x=hidden, y=mb.less_equal(x=slots, y=mb.sub(x=at, y=np.int32(window))))
    mask = mb.mul(
        x=mb.cast(x=hidden, dtype="fp16" if _like(like, 0).itemsize == 2 else "fp32"),
        y=_like(like, MASKED),
        name=f"{scope.node}__mask",
    )
    mask = mb.expand_dims(x=mask, axes=[0, 1])
    # One query per head needs no copies: its single row broadcasts.
    return mask if group == 1 or steps == 1 else mb.tile(x=mask, reps=[1, 1, group, 1])


def _chunked(scope: Scope, q: Any, keys: Any, values: Any, mask: Any, softcap: float) -> Any:
    """Attention of all heads, in channels one key head at a time: smaller tensors stay in the Neural Engine's cache."""
    count = q.shape[1]
    if not scope.channels or count == 1:
        return _scored(q, keys, values, mask, softcap)
    chunks = zip(*(mb.split(x=x, num_splits=count, axis=1) for x in (q, keys, values)), strict=True)
    return mb.concat(values=[_scored(*chunk, mask, softcap) for chunk in chunks], axis=1)


def _scored(q: Any, keys: Any, values: Any, mask: Any, softcap: float) -> Any:
    if not softcap:
        return mb.scaled_dot_product_attention(query=q, key=keys, value=values, attn_mask=mask)
    scores = mb.matmul(x=q, y=keys, transpose_y=True)
    scores = mb.mul(x=mb.tanh(x=mb.mul(x=scores, y=_like(scores, 1 / softcap))), y=_like(scores, softcap))
    return mb.matmul(x=mb.softmax(x=mb.add(x=scores, y=mask), axis=-1), y=values)


#: operator, as the vendor's table spells it -> its lowering
LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "edge::quantized_linear": _quantized_linear,
    "edge::quantized_embedding": _quantized_embedding,
    "edge::table_linear": _table_linear,
    "edge::table_embedding": _table_embedding,
    "edge::rms_norm": _rms_norm,
    "edge::add_rms_norm": _add_rms_norm,
    "edge::swiglu": _swiglu,
    "edge::snake": _snake,
    "edge::codebook_lookup": _codebook_lookup,
    "edge::rope_angles": _rope_angles,
    "edge_coreml::attention": _attention,
    "edge_coreml::linear": _linear,
    "edge_coreml::gelu": lambda scope, name, x, mode: mb.gelu(x=x, mode=_GELU_MODES[mode], name=name),
    "edge_coreml::group_norm": _group_norm,
    "cdist": _cdist,
    whole_quotient.__name__: _whole_quotient,
}
