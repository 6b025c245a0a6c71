"""The kernels as functions of arrays: what each takes, in the shim's order, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from exporters import cpu_layout
from tools.kernel_library import Call

Array = np.ndarray[Any, Any]
Run = Callable[[Call, int], None]

ACTIVATIONS = ("none", "silu", "snake", "tanh")


def _float(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32)


def _weight(codes: Array, scales: Array, zeros: Array | None, bits: int, columns: int) -> tuple[list, list[int]]:
    packed = cpu_layout.pack_quantized(codes, scales, zeros, bits)
    sizes = [len(codes), columns, bits, codes.shape[2] * 8 // bits]
    return [packed.codes, packed.scales, packed.zeros], sizes


def quantized_linear(run: Run, x, codes, scales, zeros, bias, bits, columns, *, fast=False, tasks=1) -> Array:
    rows = _float(x).reshape(-1, columns)
    weight, sizes = _weight(codes, scales, zeros, bits, columns)
    y = np.full((len(rows), len(codes)), np.nan, np.float32)
    run(Call("quantized_linear", [rows, *weight, bias, y], [*sizes, len(rows), fast]), tasks)
    return y.reshape(*x.shape[:-1], -1)


def quantized_embedding(run: Run, ids, codes, scales, zeros, bits, columns, *, tasks=1) -> Array:
    flat = np.ascontiguousarray(ids, np.int32).reshape(-1)
    weight, sizes = _weight(codes, scales, zeros, bits, columns)
    y = np.full((len(flat), columns), np.nan, np.float32)
    run(Call("quantized_embedding", [flat, *weight, y], [*sizes, len(flat)]), tasks)
    return y.reshape(*ids.shape, columns)


def linear(run: Run, x, weight, bias, *, tasks=1) -> Array:
    """Weights of float16 go to the kernel of half precision."""
    y = np.full((len(x), len(weight)), np.nan, np.float32)
    name = "linear_f16" if weight.dtype == np.float16 else "linear"
    run(Call(name, [_float(x), cpu_layout.pack_linear(weight), bias, y], [len(x), *weight.shape]), tasks)
    return y


def kv_attention(run: Run, rows: Sequence[Array], caches: Sequence[Array], last: Array, cos, sin, *, heads, kv_heads,
                 scale, window, softcap, tasks=1) -> Array:  # fmt: skip
    """``rows``: packed [q|k|v], or query, key and value; writes to ``caches`` and returns [B, S, heads*D]."""
    batch, steps = rows[0].shape[:2]
    capacity, width = caches[0].shape[2:]
    rows = [_float(part) for part in rows]
    if len(rows) == 1:
        flat = rows[0].reshape(-1)
        parts = [flat, flat[heads * width :], flat[(heads + kv_heads) * width :]]
        strides = [rows[0].shape[2]] * 3
    else:
        parts, strides = rows, [part.shape[2] for part in rows]
    sizes = [batch, steps, heads, kv_heads, width, capacity, window, 0, 0, *strides]
    tables = [None if t is None else _float(t) for t in (cos, sin)]
    shared = [*parts, *tables, np.ascontiguousarray(last, np.int32), *caches]
    y = np.full((batch, steps, heads * width), np.nan, np.float32)
    run(Call("kv_append", shared, sizes, [scale, softcap]), tasks)
    run(Call("kv_attend", [*shared, y], sizes, [scale, softcap]), tasks)
    return y


def rms_norm(run: Run, x, weight, eps, *, tasks=1) -> Array:
    y = np.full_like(x, np.nan)
    run(Call("rms_norm", [x, weight, y], [x.size // x.shape[-1], x.shape[-1]], [eps]), tasks)
    return y


def add_rms_norm(run: Run, x, residual, weight, eps, *, tasks=1) -> tuple[Array, Array]:
    y, total = np.full_like(x, np.nan), np.full_like(x, np.nan)
    sizes = [x.size // x.shape[-1], x.shape[-1]]
    run(Call("add_rms_norm", [x, residual, weight, y, total], sizes, [eps]), tasks)
    return y, total


def swiglu(run: Run, joined, *, tasks=1) -> Array:
    columns = joined.shape[-1] // 2
    y = np.full((*joined.shape[:-1], columns), np.nan, np.float32)
    run(Call("swiglu", [joined, y], [y.size // columns, columns]), tasks)
    return y


def activate(run: Run, x, name: str, *, tasks=1) -> Array:
    y = np.full_like(x, np.nan)
    run(Call("activate", [x, y], [x.size, ACTIVATIONS.index(name)]), tasks)
    return y


def group_norm(run: Run, x, weight, bias, eps, groups, name: str, *, tasks=1) -> Array:
    y = np.full_like(x, np.nan)
    sizes = [*x.shape[:2], x[0, 0].size, groups, ACTIVATIONS.index(name)]
    run(Call("group_norm", [x, weight, bias, y], sizes, [eps]), tasks)
    return y


def group_norm_factors(run: Run, x, weight, bias, eps, groups, *, tasks=1) -> tuple[Array, Array]:
    scale, shift = (np.full(x.shape[:2], np.nan, np.float32) for _ in range(2))
    sizes = [*x.shape[:2], x[0, 0].size, groups]
    run(Call("group_norm_factors", [x, weight, bias, scale, shift], sizes, [eps]), tasks)
    return scale, shift


def codebook_lookup(run: Run, codes, tables, size, *, tasks=1) -> Array:
    batch, books = codes.shape[:2]
    y = np.full((batch, tables.shape[1], *codes.shape[2:]), np.nan, np.float32)
    sizes = [batch, books, codes[0, 0].size, size, tables.shape[1]]
    run(Call("codebook_lookup", [np.ascontiguousarray(codes, np.int32), tables, y], sizes), tasks)
    return y


def nearest_code(run: Run, x, codes, *, tasks=1) -> Array:
    y = np.full(len(x), -1, np.int64)
    run(Call("nearest_code", [_float(x), cpu_layout.pack_linear(_float(codes)), y], [len(x), *codes.shape]), tasks)
    return y


def conv(run: Run, x, weight, *, out, stride, pad, dilation, groups=1, upsample=1, transposed=False, scale=None,
         shift=None, before="none", bias=None, residual=None, after="none", tasks=1) -> Array:  # fmt: skip
    """x [B, I, H, W]; weight as frameworks hold it; ``out`` (O, H, W) of the result; the rest in pairs (y, x)."""
    kernel = weight.shape[2:]
    pack = cpu_layout.pack_conv_transpose if transposed else cpu_layout.pack_conv
    per_batch = scale is not None and scale.ndim == 2
    y = np.full((len(x), *out), np.nan, np.float32)
    sizes = [*x.shape, *out, *kernel, *stride, *pad, *dilation, groups, upsample]
    sizes += [per_batch, ACTIVATIONS.index(before), ACTIVATIONS.index(after)]
    buffers = [x, pack(weight, groups), scale, shift, bias, residual, y]
    run(Call("conv_transpose2d" if transposed else "conv2d", buffers, sizes), tasks)
    return y
