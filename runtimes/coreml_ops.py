"""MIL operators in numpy: what each computes, in float32 whatever the type that its result is then rounded to.

Source of the semantics: the operators' docstrings in coremltools (converters/mil/mil/ops/defs). Every entry of OPS is
a function of the operation's arguments by name; constants come as arrays, strings or lists of arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = Any  # numpy's own types know no index of an ellipsis and slices
Lowered = Callable[..., Any]


def _ints(value: Any) -> list[int]:
    return [int(item) for item in np.asarray(value).reshape(-1)]


# --- sums and shapes ----------------------------------------------------------------------------------------------


def _reduce(function: Callable[..., Any]) -> Lowered:
    def reduce(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        chosen = None if axes is None else tuple(_ints(axes))
        return np.asarray(function(x, axis=chosen, keepdims=bool(keep_dims)))

    return reduce


def _arg(function: Callable[..., Any]) -> Lowered:
    def reduce(x: Array, axis: Any, keep_dims: Any = True, output_dtype: str = "int32") -> Array:
        result = function(x, axis=int(axis), keepdims=bool(keep_dims))
        return result.astype(output_dtype)

    return reduce


def reshape(x: Array, shape: Array) -> Array:
    """A size of 0 is the input's own."""
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))]
    return x.reshape(sizes)


def slice_by_index(
    x: Array, begin: Array, end: Array, stride: Any = None, begin_mask: Any = None, end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array, update: Array, begin: Array, end: Array, stride: Any = None, begin_mask: Any = None, end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    at = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[at].shape != update.shape:
        raise ValueError(f"slice_update of {list(x[at].shape)} with {list(update.shape)}")
    out = x.copy()
    out[at] = update
    return out


def _slices(x: Array, begin: Any, end: Any, stride: Any, first: Any, last: Any, squeeze: Any) -> tuple[Any, ...]:
    def given(mask: Any) -> Sequence[bool]:
        return [False] * x.ndim if mask is None else [bool(item) for item in np.asarray(mask).reshape(-1)]

    steps = [1] * x.ndim if stride is None else _ints(stride)
    rows = zip(_ints(begin), _ints(end), steps, given(first), given(last), given(squeeze), strict=True)
    return tuple(
        b if single else slice(None if open_begin else b, None if open_end else e, step)
        for b, e, step, open_begin, open_end, single in rows
    )


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> list[Array]:
    if split_sizes is None:
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(_ints(split_sizes))[:-1], int(axis))


def concat(values: Any, axis: Any, interleave: Any = False) -> Array:
    if bool(interleave):
        raise ValueError("interleaved concat")
    parts = values if isinstance(values, list) else [values]
    return np.concatenate([np.atleast_1d(part) for part in parts], int(axis))


def gather(x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    if int(batch_dims):
        raise ValueError("gather with batch_dims")
    return np.take(x, indices, int(axis))


def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    """One element for each index, along an axis."""
    return np.take_along_axis(x, np.asarray(indices).astype(np.int64), int(axis))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Pairs (before, after) for the last axes."""
    pairs = np.asarray(pad).reshape(-1, 2).tolist()
    widths = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).item())
    return np.pad(x, widths, mode={"reflect": "reflect", "replicate": "edge"}[mode])  # type: ignore[call-overload]


def cast(x: Array, dtype: str) -> Array:
    """Types that a program computes in; the result of a float one is rounded where its output says float16."""
    kind = {"fp16": "float32", "fp32": "float32"}.get(dtype, dtype)
    return x.astype(kind)


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def expand_dims(x: Array, axes: Any) -> Array:
    return np.expand_dims(x, tuple(_ints(axes)))


def squeeze(x: Array, axes: Any = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(_ints(axes)))


def stack(values: Any, axis: Any) -> Array:
    return np.stack(values if isinstance(values, list) else [values], int(axis))


# --- products -----------------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Any = None) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    return (np.swapaxes(x, -1, -2) if bool(transpose_x) else x) @ (np.swapaxes(y, -1, -2) if bool(transpose_y) else y)


def softmax(x: Array, axis: Any = -1) -> Array:
    raised = np.exp(x - x.max(int(axis), keepdims=True))
    return raised / raised.sum(int(axis), keepdims=True)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Any = None) -> Array:
    """One operator: what is rounded is its result."""
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores) @ value


def conv(
    x: Array, weight: Array, bias: Any = None, strides: Any = None, pad_type: str = "valid", pad: Any = None,
    dilations: Any = None, groups: Any = 1,
) -> Array:  # fmt: skip
    """Convolution of [B, C, ...] with [N, C/groups, ...]: one matrix product per tap of the kernel."""
    kernel, count = weight.shape[2:], int(groups)
    steps, spread = (_ints(v) if v is not None else [1] * len(kernel) for v in (strides, dilations))
    before, after = _padding(x.shape[2:], kernel, steps, spread, pad_type, pad)
    x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    sizes = [(x.shape[i + 2] - spread[i] * (k - 1) - 1) // steps[i] + 1 for i, k in enumerate(kernel)]
    batch, rows = x.shape[0], weight.shape[0] // count
    inputs = x.reshape(batch, count, -1, *x.shape[2:])
    taps = weight.reshape(count, rows, -1, *kernel)
    total: Array = np.zeros((batch, count, rows, math.prod(sizes)), np.float32)
    for tap in itertools.product(*map(range, kernel)):
        window = inputs[(..., *_taken(tap, spread, sizes, steps))]
        total += taps[(..., *tap)] @ window.reshape(batch, count, -1, math.prod(sizes))
    y = total.reshape(batch, -1, *sizes)
    return y if bias is None else y + np.asarray(bias).reshape(-1, *[1] * len(sizes))


def _padding(
    size: tuple[int, ...], kernel: tuple[int, ...], steps: list[int], spread: list[int], pad_type: str, pad: Any
) -> tuple[list[int], list[int]]:
    """Zeros before and after each axis."""
    if pad_type == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    if pad_type == "custom":
        pairs = np.asarray(pad).reshape(-1, 2)
        return _ints(pairs[:, 0]), _ints(pairs[:, 1])
    total = [
        max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        for n, k, s, d in zip(size, kernel, steps, spread, strict=True)
    ]
    lower = [t - t // 2 for t in total] if pad_type == "same_lower" else [t // 2 for t in total]
    return lower, [t - low for t, low in zip(total, lower, strict=True)]


def _taken(tap: tuple[int, ...], spread: list[int], sizes: Sequence[int], steps: list[int]) -> Iterator[slice]:
    """Along each axis, the places that one tap of a kernel meets."""
    for at, distance, count, step in zip(tap, spread, sizes, steps, strict=True):
        yield slice(at * distance, at * distance + (count - 1) * step + 1, step)


def conv_transpose(
    x: Array, weight: Array, bias: Any = None, pad: Any = None, output_shape: Any = None, pad_type: str = "valid",
    strides: Any = None, dilations: Any = None, groups: Any = 1,
) -> Array:  # fmt: skip
    """The adjoint of ``conv`` with weight [C, N/groups, ...]: each tap adds a product into every stride-th place."""
    kernel, count = weight.shape[2:], int(groups)
    if pad_type.startswith("same"):
        raise ValueError(f"conv_transpose with pad_type {pad_type}")
    steps, spread = (_ints(v) if v is not None else [1] * len(kernel) for v in (strides, dilations))
    before, after = _padding((), kernel, steps, spread, pad_type, pad)
    batch, sizes = x.shape[0], x.shape[2:]
    whole = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(sizes, steps, spread, kernel, strict=True)]
    inputs = x.reshape(batch, count, -1, math.prod(sizes))
    taps: Array = np.swapaxes(weight.reshape(count, -1, *weight.shape[1:]), 1, 2)
    total: Array = np.zeros((batch, count, weight.shape[1], *whole), np.float32)
    for tap in itertools.product(*map(range, kernel)):
        total[(..., *_taken(tap, spread, sizes, steps))] += (taps[(..., *tap)] @ inputs).reshape(
            batch, count, -1, *sizes
        )
    y: Array = total.reshape(batch, -1, *whole)
    wanted = [n - b - a for n, b, a in zip(whole, before, after, strict=True)]
    if output_shape is not None:  # an output padding: what a longer input would have begun
        wanted = _ints(output_shape)[2:]
        short = [max(0, b + n - size) for b, n, size in zip(before, wanted, whole, strict=True)]
        y = np.pad(y, [(0, 0), (0, 0), *((0, missing) for missing in short)])
    y = y[(..., *(slice(b, b + n) for b, n in zip(before, wanted, strict=True)))]
    return y if bias is None else y + np.asarray(bias).reshape(-1, *[1] * len(wanted))


# --- norms and activations ----------------------------------------------------------------------------------------


def layer_norm(x: Array, axes: Any = None, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    over = tuple(range(x.ndim)) if axes is None else tuple(_ints(axes))
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + np.float32(epsilon))
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Array:
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = 1 / np.sqrt(variance + np.float32(epsilon))
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return x * scale.reshape(shape) + shift.reshape(shape)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rsqrt(x: Array, epsilon: Any = 1e-12) -> Array:
    return 1 / np.sqrt(x + np.float32(epsilon))


def elu(x: Array, alpha: Any = 1.0) -> Array:
    return np.where(x > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, 0)))


def leaky_relu(x: Array, alpha: Any = 0.01) -> Array:
    return np.where(x > 0, x, np.float32(alpha) * x)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return np.float32(0.5) * x * (1 + _erf(x / np.float32(math.sqrt(2))))
    if mode != "TANH_APPROXIMATION":
        raise ValueError(f"gelu of mode {mode}")
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def topk(
    x: Array,
    k: Any,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: Any = None,
) -> list[Array]:
    # Of equal values the first, as the frameworks that models come from take them.
    order = np.argsort(x if ascending else -x, int(axis), kind="stable")
    indices = np.take(order, np.arange(int(k)), int(axis)).astype(np.int32)
    values = np.take_along_axis(x, indices, int(axis))
    return [values, indices] if return_indices else [values]


def clip(x: Array, alpha: Any, beta: Any) -> Array:
    return np.clip(x, np.float32(alpha), np.float32(beta))


def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    height, width = float(scale_factor_height), float(scale_factor_width)
    if height % 1 or width % 1:
        raise ValueError(f"upsampling by {height} x {width}")
    return x.repeat(int(height), -2).repeat(int(width), -1)


# --- compressed constants -----------------------------------------------------------------------------------------


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Any = None) -> Array:
    """``scale * (data - offset)``, a scale and an offset for each block; a block's sizes follow from the shapes."""
    values = data.astype(np.float32)
    blocks = [size // count for size, count in zip(data.shape, scale.shape, strict=True)]

    def spread(parameter: Array) -> Array:
        for axis, block in enumerate(blocks):
            parameter = parameter.repeat(block, axis) if block > 1 else parameter
        return parameter.astype(np.float32)

    if offset is not None:
        values = values - spread(offset)
    return spread(scale) * values


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: Any = None) -> Array:
    """``lut[block of the index, index]``: [blocks..., entries, 1], a table for each block."""
    if lut.shape[-1] != 1:
        raise ValueError("a lookup table of vectors")
    blocks = [size // count for size, count in zip(indices.shape, lut.shape[:-2], strict=True)]
    grids = np.meshgrid(
        *(np.arange(size) // block for size, block in zip(indices.shape, blocks, strict=True)), indexing="ij"
    )
    return lut[(*grids, indices.astype(np.intp), 0)].astype(np.float32)


def _floor_div(x: Array, y: Array) -> Array:
    return np.floor_divide(x, y)


#: type of the operation -> what it computes
OPS: Mapping[str, Lowered] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "cast": cast,
    "clip": clip,
    "concat": concat,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "cos": lambda x: np.cos(x),
    "elu": elu,
    "equal": lambda x, y: x == y,
    "exp": lambda x: np.exp(x),
    "expand_dims": expand_dims,
    "floor_div": _floor_div,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "layer_norm": layer_norm,
    "leaky_relu": leaky_relu,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": linear,
    "logical_and": lambda x, y: np.logical_and(x, y),
    "logical_not": lambda x: np.logical_not(x),
    "logical_or": lambda x, y: np.logical_or(x, y),
    "matmul": matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pad": pad,
    "pow": lambda x, y: np.power(x, y),
    "real_div": lambda x, y: x / y,
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "reduce_l2_norm": _reduce(lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims))),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_min": _reduce(np.min),
    "reduce_sum": _reduce(np.sum),
    "relu": lambda x: np.maximum(x, 0),
    "reshape": reshape,
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "round": lambda x: np.rint(x),
    "select": select,
    "shape": lambda x: np.array(x.shape, np.int32),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sin": lambda x: np.sin(x),
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "softmax": softmax,
    "split": split,
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: np.square(x),
    "squeeze": squeeze,
    "stack": stack,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "tile": lambda x, reps: np.tile(x, _ints(reps)),
    "topk": topk,
    "transpose": lambda x, perm: x.transpose(_ints(perm)),
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
