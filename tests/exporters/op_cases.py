"""The table of fused ops: op x dtype x shape, each case with its own formula in float64.

A case names the arguments that stay (weights, sizes), makes those that change with the length of a run, and says what
the result must be. tests/exporters/test_ops.py runs each through every target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

#: How near the formula a result must be, by name; each runner says what that is in numbers. Rounding of the dtype with
#: room for sums of some hundred terms, or, for what is only moved, no difference at all.
FLOAT32, FLOAT16, EXACT = "float32", "float16", "exact"
#: Of rounded activations: a runtime that divides by multiplying with the reciprocal moves what lies on a tie to the
#: next code, and the largest negative value of a symmetric scale lies on the tie -127.5 always.
CODE = "code"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        inputs: (generator, length) -> the arguments that change from run to run.
        dynamic: which axis of each of them is the length.
        fixed: the other arguments by name.
        formula: all arguments by name -> the results, in float64.
        tolerance: FLOAT32, FLOAT16, EXACT or CODE.
        decomposed: targets whose lowering cannot take the case, so that the reference stands in.
    """

    op: str
    label: str
    inputs: Callable[[np.random.Generator, int], dict[str, Array]]
    dynamic: Mapping[str, int]
    fixed: Mapping[str, Any]
    formula: Callable[..., tuple[Array, ...]]
    tolerance: str = FLOAT32
    decomposed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


# --- the formulas ---------------------------------------------------------------------------------------------------


def unpacked(packed: Array, bits: int) -> Array:
    """Codes of packed bytes [..., P] -> [..., P*8/bits]: bits in order of significance, the lowest first."""
    parts = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return parts @ (1 << np.arange(bits))


def dequantised(codes: Array, scales: Array, zeros: Array | None, bits: int, columns: int) -> Array:
    zero = 2 ** (bits - 1) if zeros is None else unpacked(zeros, bits)[:, : codes.shape[1], None]
    return ((unpacked(codes, bits) - zero) * scales.astype(float)[..., None]).reshape(len(codes), -1)[:, :columns]


def quantized_linear(x, codes, scales, zeros, bias, bits, columns):
    y = x.astype(float) @ dequantised(codes, scales, zeros, bits, columns).T
    return (y if bias is None else y + bias,)


def quantized_embedding(ids, codes, scales, zeros, bits, columns):
    return (dequantised(codes, scales, zeros, bits, columns)[ids],)


#: value of each code, by numpy's own types; nf4's are quantiles of a normal distribution (QLoRA, appendix E)
_TYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def looked_up(codes: Array, scales: Array, encoding: str, columns: int) -> Array:
    each = unpacked(codes, 4 if encoding in ("nf4", "float4_e2m1fn") else 8).astype(np.uint8)
    values = np.array(_NF4)[each] if encoding == "nf4" else each.view(_TYPES[encoding]).astype(float)
    return (values * scales.astype(float)[..., None]).reshape(len(codes), -1)[:, :columns]


def table_linear(x, codes, scales, bias, encoding, columns):
    y = x.astype(float) @ looked_up(codes, scales, encoding, columns).T
    return (y if bias is None else y + bias,)


def table_embedding(ids, codes, scales, encoding, columns):
    return (looked_up(codes, scales, encoding, columns)[ids],)


def nearest(values: Array, table: Array) -> Array:
    """The nearest entry of a sorted table, of two as near the one whose place is even."""
    right = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    low, high = table[right - 1], table[right]
    middle = (low + high) / 2
    even = np.where((right - 1 - len(table) // 2) % 2 == 0, low, high)
    return np.where(values < middle, low, np.where(values > middle, high, even))


def quantize_activation(x, encoding, group, symmetric, scale, zero_point, global_scale):
    """In float64 but for the divisions, whose rounding to float32 decides what is on a tie."""
    if encoding in _TYPES:
        table = np.sort(np.arange(256 if "8" in encoding else 16, dtype=np.uint8).view(_TYPES[encoding]).astype(float))
        table = np.unique(table[np.isfinite(table)])
    else:
        table = np.arange(-128.0, 128.0)
    rows = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    least, most = np.minimum(rows.min(-1, keepdims=True), 0), np.maximum(rows.max(-1, keepdims=True), 0)
    span = np.float32(table[-1] - table[0])
    if scale:
        by, zero = np.float32(scale), np.float32(zero_point)
    elif symmetric:
        by, zero = np.maximum(-least, most) / (span / 2), np.float32(0)
    else:
        by = (most - least) / span
        zero = np.rint(np.clip(np.float32(-128) - least / by, -128, 127))
    codes = nearest(np.clip((rows / by + zero).astype(np.float32), table[0], table[-1]).astype(float), table)
    return (((codes - zero) * by.astype(float)).reshape(x.shape),)


def rms_norm(x, weight, eps):
    x = x.astype(float)
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight,)


def add_rms_norm(x, residual, weight, eps):
    total = x.astype(float) + residual
    return (*rms_norm(total, weight, eps), total)


def swiglu(joined):
    gate, up = np.split(joined.astype(float), 2, -1)
    return (gate / (1 + np.exp(-gate)) * up,)


def snake(z):
    z = z.astype(float)
    return (z + np.sin(z) ** 2,)


def projection(x, norm, codes, scales, zeros, bias, residual, bits, columns, eps, gated):
    if norm is not None:
        [x] = rms_norm(x, norm.astype(float), eps)
    [y] = quantized_linear(x, codes, scales, zeros, bias, bits, columns)
    if gated:
        [y] = swiglu(y)
    return (y if residual is None else y + residual,)


def bias_snake(x, bias):
    return snake(x.astype(float) + bias.reshape(1, -1, *[1] * (x.ndim - 2)))


def group_norm_silu(x, weight, bias, groups, eps):
    rows = x.astype(float).reshape(len(x), groups, -1)
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + eps)
    affine = (slice(None), *[None] * (x.ndim - 2))
    z = normed.reshape(x.shape) * weight.astype(float)[affine] + bias.astype(float)[affine]
    return (z / (1 + np.exp(-z)),)


def codebook_lookup(codes, tables, size):
    books = tables.astype(float).reshape(-1, size, tables.shape[1])
    return (np.moveaxis(sum(book[codes[:, i]] for i, book in enumerate(books)), -1, 1),)


def rope_angles(cos, sin, positions):
    return tuple(np.concatenate([table[positions]] * 2, -1) for table in (cos, sin))


def turned(rows: Array, cos: Array, sin: Array) -> Array:
    """RoPE as a product of complex numbers: rows [T, H, D] whose halves are real and imaginary parts."""
    half = rows.shape[-1] // 2
    product = (rows[..., :half] + 1j * rows[..., half:]) * (cos + 1j * sin)[: len(rows), None]
    return np.concatenate([product.real, product.imag], -1)


def kv_attention(query, key, value, cos, sin, heads, kv_heads, scale, window, softcap):
    """The whole sequence at once, without a cache: (output [B, T, H*D], keys and values [B, KV, T, D])."""
    rows = query if key is None else np.concatenate([query, key, value], -1)
    batch, steps = rows.shape[:2]
    parts = rows.astype(float).reshape(batch, steps, heads + 2 * kv_heads, -1)
    out, keys, values = [], [], []
    for row in parts:
        q, k, v = np.split(row, [heads, heads + kv_heads], 1)
        if cos is not None:
            q, k = turned(q, cos.astype(float), sin.astype(float)), turned(k, cos.astype(float), sin.astype(float))
        result = np.zeros_like(q)
        for i, head in itertools.product(range(steps), range(heads)):
            seen = slice(max(0, i + 1 - window) if window else 0, i + 1)
            scores = k[seen, head // (heads // kv_heads)] @ q[i, head] * scale
            weights = np.exp(softcap * np.tanh(scores / softcap) if softcap else scores)
            result[i, head] = weights @ v[seen, head // (heads // kv_heads)] / weights.sum()
        out.append(result.reshape(steps, -1))
        keys.append(k.swapaxes(0, 1))
        values.append(v.swapaxes(0, 1))
    return np.stack(out), np.stack(keys), np.stack(values)


# --- the rows -------------------------------------------------------------------------------------------------------


def _quantised(bits: int, block: int, zeros: bool, rows: int, columns: int) -> dict[str, Any]:
    """Random codes that use every value, in the layout of ``edge::quantized_linear``."""
    random = np.random.default_rng(bits * block + zeros)
    blocks = -(-columns // block)
    return {
        "codes": random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "scales": random.uniform(0.001, 0.1, (rows, blocks)).astype(np.float32),
        "zeros": random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None,
        "bits": bits,
        "columns": columns,
    }


def _linear(bits: int, block: int, zeros: bool, rows: int, columns: int, bias=False, flat=False) -> Case:
    fixed = _quantised(bits, block, zeros, rows, columns)
    fixed["bias"] = np.linspace(-3, 3, rows, dtype=np.float32) if bias else None

    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        shape = (length, columns) if flat else (1, length, columns)
        return {"x": random.standard_normal(shape).astype(np.float32)}

    parts = [f"int{bits}", f"block{block}", "zeros" if zeros else "symmetric", f"{rows}x{columns}"]
    label = "-".join(parts + ["bias"] * bias + ["flat"] * flat)
    return Case("quantized_linear", label, inputs, {"x": 0 if flat else 1}, fixed, quantized_linear)


def _embedding(bits: int, block: int, zeros: bool, columns: int) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"ids": random.integers(0, 13, (1, length)).astype(np.int32)}

    fixed = _quantised(bits, block, zeros, 13, columns)
    label = f"int{bits}-block{block}-{'zeros' if zeros else 'symmetric'}-13x{columns}"
    return Case("quantized_embedding", label, inputs, {"ids": 1}, fixed, quantized_embedding)


def _coded(encoding: str, block: int, rows: int, columns: int, uniform: bool = False) -> dict[str, Any]:
    """Random codes that are numbers, in the layout of ``edge::table_linear``; ``uniform``: one scale a row."""
    random = np.random.default_rng(block)
    blocks, bits = -(-columns // block), 4 if encoding in ("nf4", "float4_e2m1fn") else 8
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    if encoding in _TYPES and bits == 8:
        codes[~np.isfinite(codes.view(_TYPES[encoding]).astype(float))] = 0
    scales = random.uniform(0.001, 0.1, (rows, 1 if uniform else blocks)).astype(np.float32)
    return {
        "codes": codes,
        "scales": np.broadcast_to(scales, (rows, blocks)).copy(),
        "encoding": encoding,
        "columns": columns,
    }


def _table_linear(encoding: str, block: int, rows: int, columns: int, *, bias=False, flat=False, uniform=False) -> Case:
    fixed = _coded(encoding, block, rows, columns, uniform)
    fixed["bias"] = np.linspace(-3, 3, rows, dtype=np.float32) if bias else None

    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        shape = (length, columns) if flat else (1, length, columns)
        return {"x": random.standard_normal(shape).astype(np.float32)}

    parts = [encoding, f"block{block}", f"{rows}x{columns}"]
    label = "-".join(parts + ["bias"] * bias + ["flat"] * flat + ["uniform"] * uniform)
    return Case("table_linear", label, inputs, {"x": 0 if flat else 1}, fixed, table_linear)


def _activation(encoding: str, label: str, group=0, symmetric=True, scale=0.0, zero_point=0) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        # Rows from small to large, one with values on a static scale's ties and past its range.
        x = random.standard_normal((1, length, 64)) * np.logspace(-2, 2, length)[None, :, None]
        x[0, 0, :8] = np.float32([0.5, 1.5, -0.5, -2.5, 150, -200, 0, 3.5]) * np.float32(scale or 1)
        return {"x": x.astype(np.float32)}

    fixed = dict(encoding=encoding, group=group, symmetric=symmetric, scale=scale, zero_point=zero_point)
    fixed |= {"global_scale": 0.0}
    return Case("quantize_activation", f"{encoding}-{label}", inputs, {"x": 1}, fixed, quantize_activation, CODE)


def _table_embedding(encoding: str, block: int, columns: int) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"ids": random.integers(0, 13, (1, length)).astype(np.int32)}

    fixed = _coded(encoding, block, 13, columns)
    return Case("table_embedding", f"{encoding}-block{block}-13x{columns}", inputs, {"ids": 1}, fixed, table_embedding)


def _attention(
    label: str, heads: int, kv_heads: int, *, packed=True, rope=True, window=0, softcap=0.0, width=16, batch=1,
    dtype=np.float32,
) -> Case:  # fmt: skip
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        sizes = [heads + 2 * kv_heads] if packed else [heads, kv_heads, kv_heads]
        names = ("query", "key", "value")
        rows = {name: random.standard_normal((batch, length, size * width)) for name, size in zip(names, sizes)}  # noqa: B905
        return {name: row.astype(dtype) for name, row in rows.items()}

    angles = np.arange(CAPACITY)[:, None] / 100.0 ** np.linspace(0, 1, width // 2, endpoint=False)
    fixed = {
        "cos": np.cos(angles).astype(dtype) if rope else None,
        "sin": np.sin(angles).astype(dtype) if rope else None,
        "heads": heads,
        "kv_heads": kv_heads,
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
    } | ({"key": None, "value": None} if packed else {})
    dynamic = dict.fromkeys(inputs(np.random.default_rng(0), 1), 1)
    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    decomposed = ("onnx/fused",) if width % 8 or batch > 1 else ()
    return Case("kv_attention", label, inputs, dynamic, fixed, kv_attention, tolerance, decomposed)


def _norm(op: str, width: int, dtype: type) -> Case:
    names = ("x",) if op == "rms_norm" else ("x", "residual")

    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        # Rows from tiny, where eps matters, to large.
        size = np.logspace(-3, 2, length)[None, :, None]
        return {name: (random.standard_normal((1, length, width)) * size).astype(dtype) for name in names}

    fixed = {"weight": np.linspace(-2, 2, width).astype(dtype), "eps": 1e-5}
    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    label = f"{np.dtype(dtype).name}-{width}"
    return Case(
        op, label, inputs, dict.fromkeys(names, 1), fixed, {"rms_norm": rms_norm}.get(op, add_rms_norm), tolerance
    )


def _swiglu(width: int, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"joined": (4 * random.standard_normal((1, length, 2 * width))).astype(dtype)}

    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    return Case("swiglu", f"{np.dtype(dtype).name}-{width}", inputs, {"joined": 1}, {}, swiglu, tolerance)


def _snake(channels: int, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"z": (3 * random.standard_normal((2, channels, length))).astype(dtype)}

    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    return Case("snake", f"{np.dtype(dtype).name}-{channels}", inputs, {"z": 2}, {}, snake, tolerance)


def _projection(
    bits: int, block: int, zeros: bool, rows: int, columns: int, dtype: type = np.float32, *,
    norm=False, gated=False, bias=False, residual=False,
) -> Case:  # fmt: skip
    fixed = _quantised(bits, block, zeros, rows, columns)
    fixed["scales"] = fixed["scales"].astype(dtype)
    fixed["norm"] = np.linspace(-2, 2, columns).astype(dtype) if norm else None
    fixed["bias"] = np.linspace(-3, 3, rows).astype(dtype) if bias else None
    fixed |= {"eps": 1e-5, "gated": gated} | ({} if residual else {"residual": None})

    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        sizes = {"x": columns} | ({"residual": rows // 2 if gated else rows} if residual else {})
        return {name: random.standard_normal((1, length, size)).astype(dtype) for name, size in sizes.items()}

    around = {"norm": norm, "gated": gated, "bias": bias, "residual": residual}
    parts = [f"int{bits}", f"block{block}", "zeros" if zeros else "symmetric", f"{rows}x{columns}"]
    label = "-".join(parts + [name for name, there in around.items() if there] + ["float16"] * (dtype is np.float16))
    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    dynamic = {"x": 1} | ({"residual": 1} if residual else {})
    return Case("projection", label, inputs, dynamic, fixed, projection, tolerance)


def _bias_snake(channels: int, image: bool, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"x": (3 * random.standard_normal((2, channels, length, *[3] * image))).astype(dtype)}

    fixed = {"bias": np.linspace(-2, 2, channels).astype(dtype)}
    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    label = f"{'image' if image else 'audio'}-{np.dtype(dtype).name}-{channels}"
    return Case("bias_snake", label, inputs, {"x": 2}, fixed, bias_snake, tolerance)


def _group_norm_silu(channels: int, groups: int, image: bool, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        # Off from zero, and of another size in each channel: group norms that forget the mean or mix groups show.
        size = np.linspace(1, 2, channels).reshape(1, -1, *[1] * (1 + image))
        x = 1 + random.standard_normal((2, channels, length, *[3] * image))
        return {"x": (x * size).astype(dtype)}

    fixed = {
        "weight": np.linspace(-2, 2, channels).astype(dtype),
        "bias": np.linspace(1, -1, channels).astype(dtype),
        "groups": groups,
        "eps": 1e-5,
    }
    tolerance = FLOAT32 if dtype is np.float32 else FLOAT16
    label = f"{'image' if image else 'audio'}-{np.dtype(dtype).name}-{channels}in{groups}"
    return Case("group_norm_silu", label, inputs, {"x": 2}, fixed, group_norm_silu, tolerance)


def _codes(books: int, size: int, image: bool, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        shape = (length, books, 3, 4) if image else (2, books, length)
        return {"codes": random.integers(0, size, shape).astype(dtype)}

    tables = np.random.default_rng(books).standard_normal((books * size, 6)).astype(np.float32)
    label = f"{books}x{size}-{'image' if image else 'audio'}-{np.dtype(dtype).name}"
    return Case(
        "codebook_lookup", label, inputs, {"codes": 0 if image else 2}, {"tables": tables, "size": size},
        codebook_lookup, EXACT if books == 1 else FLOAT32,
    )  # fmt: skip


def _angles(width: int, dtype: type) -> Case:
    def inputs(random: np.random.Generator, length: int) -> dict[str, Array]:
        return {"positions": (random.integers(0, CAPACITY - length) + np.arange(length))[None].astype(dtype)}

    angles = np.arange(CAPACITY)[:, None] * np.linspace(1, 0.01, width // 2)
    fixed = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return Case("rope_angles", f"{width}-{np.dtype(dtype).name}", inputs, {"positions": 1}, fixed, rope_angles, EXACT)


#: Positions of the attention cases' cache; longer than what they write.
CAPACITY = 16

CASES: tuple[Case, ...] = (
    # An odd number of rows and an odd number of blocks, so that packed zero points end in half a byte.
    *(
        _linear(bits, block, zeros, 7, 3 * block)
        for bits, block, zeros in itertools.product((4, 8), (16, 32, 64, 128), (False, True))
    ),
    _linear(4, 32, True, 7, 41),
    _linear(4, 32, False, 9, 40, bias=True),
    _linear(8, 16, True, 1, 37, bias=True),
    _linear(8, 128, False, 33, 130),
    _linear(4, 32, True, 5, 64, bias=True, flat=True),
    *(_embedding(bits, 32, zeros, 96) for bits, zeros in itertools.product((4, 8), (False, True))),
    _embedding(4, 32, True, 41),
    _embedding(8, 128, False, 130),
    _activation("int8", "token"),
    _activation("int8", "token-zeros", symmetric=False),
    _activation("int8", "group16", group=16),
    _activation("int8", "static", scale=0.03),
    _activation("int8", "static-zeros", symmetric=False, scale=0.03, zero_point=-7),
    _activation("float8_e4m3fn", "token"),
    _activation("float8_e4m3fn", "static", scale=0.03),
    _table_linear("float8_e4m3fn", 128, 7, 384),
    _table_linear("float8_e4m3fn", 32, 9, 41, bias=True),
    _table_linear("float8_e4m3fn", 128, 6, 256, uniform=True),
    _table_linear("float8_e5m2", 64, 7, 192),
    _table_linear("float4_e2m1fn", 16, 7, 48, bias=True),
    _table_linear("float4_e2m1fn", 32, 9, 41),
    _table_linear("nf4", 64, 7, 192),
    _table_linear("nf4", 32, 5, 41, bias=True, flat=True),
    _table_embedding("float8_e4m3fn", 32, 96),
    _table_embedding("nf4", 32, 41),
    _table_embedding("float4_e2m1fn", 16, 48),
    _attention("separate-groups2", 4, 2, packed=False, rope=False),
    _attention("separate-groups2-rope", 4, 2, packed=False),
    _attention("separate-groups3-window", 6, 2, packed=False, rope=False, window=5),
    _attention("packed-groups2", 4, 2, rope=False),
    _attention("packed-groups1-rope", 3, 3),
    _attention("packed-groups2-rope", 4, 2),
    _attention("packed-groups3-rope-width24", 6, 2, width=24),
    _attention("packed-groups2-rope-window", 4, 2, window=5),
    _attention("packed-groups4-rope-softcap", 4, 1, softcap=3.0),
    _attention("packed-groups2-rope-window-softcap", 4, 2, window=3, softcap=3.0),
    _attention("packed-groups2-rope-batch2", 4, 2, batch=2),
    _attention("packed-groups2-width20", 4, 2, rope=False, width=20),
    _attention("packed-groups2-rope-width12", 4, 2, width=12),
    _attention("packed-groups2-rope-float16", 4, 2, dtype=np.float16),
    *(_norm(op, 48, dtype) for op, dtype in itertools.product(("rms_norm", "add_rms_norm"), (np.float32, np.float16))),
    _norm("rms_norm", 7, np.float32),
    _norm("add_rms_norm", 7, np.float32),
    _swiglu(24, np.float32),
    _swiglu(5, np.float32),
    _swiglu(24, np.float16),
    _snake(6, np.float32),
    _snake(6, np.float16),
    # Each of our kernels: 4 and 8 bits, with and without zero points, whole blocks and tails, one block a row.
    _projection(4, 32, True, 10, 96),
    _projection(4, 32, True, 9, 41, bias=True, residual=True),
    _projection(8, 128, False, 7, 100, norm=True),
    _projection(4, 16, True, 7, 48, norm=True, bias=True),
    _projection(8, 32, True, 12, 70, norm=True, gated=True),
    _projection(4, 64, False, 12, 64, norm=True, gated=True, bias=True),
    # What has no kernel of its own: a residual behind a norm or a gate, a gate without a norm.
    _projection(4, 32, True, 6, 64, norm=True, residual=True),
    _projection(8, 32, False, 8, 64, gated=True, bias=True, residual=True),
    _projection(4, 32, True, 9, 41, np.float16, bias=True, residual=True),
    _projection(4, 32, True, 12, 48, np.float16, norm=True, gated=True),
    _projection(8, 128, False, 7, 100, np.float16, norm=True),
    *(_bias_snake(6, image, np.float32) for image in (False, True)),
    _bias_snake(6, False, np.float16),
    *(_group_norm_silu(6, groups, groups > 1, np.float32) for groups in (1, 3)),
    _group_norm_silu(6, 2, True, np.float16),
    _codes(1, 11, True, np.int32),
    _codes(1, 11, False, np.int64),
    _codes(4, 8, False, np.int32),
    _angles(16, np.int32),
    _angles(16, np.int64),
)  # fmt: skip

#: What a backend without our kernels leaves out. It spells these ops out in parts that have rows of their own, so one
#: or two rows show that it does; and it never sees a program in float16.
KERNELS_ONLY = frozenset(str(case) for case in CASES if case.op in ("projection", "bias_snake", "group_norm_silu")) - {
    "projection-int4-block32-zeros-9x41-bias-residual",
    "projection-int8-block32-zeros-12x70-norm-gated",
    "bias_snake-image-float32-6",
    "group_norm_silu-image-float32-6in3",
}
