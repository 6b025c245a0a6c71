"""What each CUDA kernel is called with, what it must give and how far it may be off, for tests and benchmark.

A case is made from a shape and a seed: arrays in the order of the entry point's arguments, the float64 answer, and the
limit of the difference element by element, derived beside the answer. u = 2^-11 is the error of rounding to float16,
v = 2^-23 that of a float32 operation (twice the unit roundoff, since tensor cores cut off instead of rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HALF, SINGLE = 2.0**-11, 2.0**-23
TINY = 2.0**-25  # half the smallest float16
TILE, HEAD_TILE = 16, 256
OPS = ("linear", "linear_residual", "norm_linear", "norm_linear_swiglu")


@dataclass(frozen=True)
class Expected:
    """What an output must be: within ``limit`` of ``value``, element by element; no limit: the same.

    A worst case is far from what errors that do not know of each other add up to, so their root mean square has a limit
    of its own, as a share of the values': one rounding to float16 at its worst, two where a norm has rounded x before.
    """

    value: Array
    limit: Array | None = None
    rms: float = HALF


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        plan: the name of its plan function and the shape's fields before the device's (number of SMs).
        arguments: in the entry point's order: arrays, then ints, then floats; outputs hold what must not survive.
        outputs: position among the arguments -> what it must be.
        bytes: that a perfect kernel moves, to and from memory.
        products: multiplications with an addition.
        torch: the name of the comparison in tools/bench_cuda_torch.py and its sizes.
        aliases: position of an input -> of the output in whose memory it lies.
    """

    name: str
    plan: tuple[str, tuple[int, ...]]
    arguments: tuple[Any, ...]
    outputs: dict[int, Expected]
    bytes: int
    products: int
    torch: tuple[str, tuple[int, ...]] | None = None
    aliases: dict[int, int] = field(default_factory=dict)

    def check(self, found: Sequence[Any]) -> float:
        """The largest share of its limit that a difference takes (0.3: well inside).

        Raises:
            AssertionError: an output is further off than its limit.
        """
        worst = 0.0
        for position, expected in self.outputs.items():
            got = np.asarray(found[position], np.float64 if expected.limit is not None else None)
            if expected.limit is None:
                np.testing.assert_array_equal(got, expected.value, err_msg=self.name)
                continue
            same = got == expected.value  # infinities
            with np.errstate(invalid="ignore"):
                share = np.where(same, 0.0, np.abs(got - expected.value) / expected.limit)
            worst = max(worst, float(np.max(share, initial=0.0, where=~np.isnan(share))))
            assert not np.isnan(share).any(), f"{self.name}: argument {position} is not a number"
            assert worst <= 1, f"{self.name}: argument {position} is {worst:.2f} of its limit off"
            error = relative_error(got, expected.value)
            assert error <= expected.rms, f"{self.name}: argument {position} is off by {error:.1e} of its size"
        return worst


def relative_error(got: Array, value: Array) -> float:
    """Root mean square of the difference over that of the finite values."""
    finite = np.isfinite(value)
    size = np.sqrt(np.mean(value**2, where=finite)) if finite.any() else 0.0
    return float(np.sqrt(np.mean((got[finite] - value[finite]) ** 2)) / size) if size else 0.0


# --- quantised weights ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Weight:
    """codes, scales and zeros as the kernels take them, and what they stand for: (code - zero) * scale, [N, K]."""

    codes: Array
    scales: Array
    zeros: Array
    values: Array  # of the codes, less their zeros, [N, K]
    block: int

    def dense(self, rows: slice = slice(None)) -> Array:
        """Rows of the matrix in float64."""
        scales = np.repeat(self.scales[rows].astype(np.float64), self.block, axis=1)[:, : self.values.shape[1]]
        return self.values[rows] * scales

    def product(self, x: Array, *, is_normed: bool, rounds_weight: bool) -> tuple[Array, Array]:
        """x W^T in float64, and how far a kernel's sums may be off.

        Each of the K products is exact in float32, its scale and the K additions round by v each; the norm rounds x
        twice to float16 (u each) after a handful of float32 steps; the kernel of many rows rounds the weight (u).
        """
        parts = [_product(x, self.dense(slice(n, n + 4096)), is_normed, rounds_weight)
                 for n in range(0, len(self.values), 4096)]  # fmt: skip
        value, limit = (np.concatenate(part, -1) for part in zip(*parts, strict=True))
        return value, limit


def _product(x: Array, dense: Array, is_normed: bool, rounds_weight: bool) -> tuple[Array, Array]:
    magnitudes = np.abs(x) @ np.abs(dense).T
    limit = (x.shape[-1] + 16) * SINGLE * magnitudes
    if is_normed:
        limit += 2.01 * HALF * magnitudes + TINY * np.abs(dense).sum(1)
    if rounds_weight:
        limit += 1.01 * HALF * magnitudes + TINY * np.abs(x).sum(-1, keepdims=True)
    return x @ dense.T, limit


def pack(values: Array, bits: int) -> Array:
    """[.., n] of codes, low bits first in bytes, padded to whole int32: [.., ceil(n * bits / 32)]."""
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % (32 // bits))]).astype(np.uint8)
    if bits == 4:
        values = values[..., ::2] | values[..., 1::2] << 4
    return np.ascontiguousarray(values).view(np.int32)


def random_weight(
    random: np.random.Generator, rows: int, columns: int, bits: int, block: int, scale_type: Any, symmetric: bool
) -> Weight:
    """Random codes, also past the last column, where they must not count; scales of 1 / sqrt(K) / 2^bits."""
    blocks = -(-columns // block)
    codes = random.integers(0, 2**bits, (rows, blocks * block), dtype=np.uint8)
    zeros = random.integers(0, 2**bits, (rows, blocks), dtype=np.uint8)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = (random.uniform(0.2, 3, (rows, blocks)) / np.sqrt(columns) / 2**bits).astype(scale_type)
    values = codes[:, :columns].astype(np.int16) - np.repeat(zeros, block, axis=1)[:, :columns]
    return Weight(pack(codes, bits), scales, pack(zeros, bits), values, block)


def half(random: np.random.Generator, *shape: int, size: float = 1.0) -> Array:
    """Normal deviates in float16."""
    return (random.standard_normal(shape) * size).astype(np.float16)


def normed(x: Array, norm: Array, eps: float) -> Array:
    """RMS norm in float64."""
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + eps) * norm.astype(np.float64)


def linear(
    op: str, M: int, N: int, K: int, *, bits: int = 4, block: int = 32, scales: Any = np.float16,
    symmetric: bool = False, any_kernel: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """EdgeLinear and its fused forms; N counts the weight's rows."""
    random = np.random.default_rng(seed)
    weight = random_weight(random, N, K, bits, block, scales, symmetric)
    is_normed, swiglu, eps = op.startswith("norm"), op.endswith("swiglu"), 1e-6
    x, norm, bias = half(random, M, K), half(random, K, size=0.5), half(random, N)
    outputs = N // 2 if swiglu else N
    residual, y = half(random, M, outputs), np.full((M, outputs), np.nan, np.float16)

    wide = normed(x, norm, eps) if is_normed else x.astype(np.float64)
    is_gemm = M > 4 or (any_kernel and bits == 4 and block == 16)  # the kernel that branches has no GEMV for these
    value, limit = weight.product(wide, is_normed=is_normed, rounds_weight=is_gemm)
    value = value + bias
    limit = limit + SINGLE * np.abs(value)
    if op == "linear_residual":
        value = value + residual
    if swiglu:
        value, limit = _swiglu(value, limit)
    limit = limit + HALF * (np.abs(value) + limit) + TINY

    arguments = [x, *([norm] if is_normed else []), weight.codes, weight.scales, weight.zeros, bias]
    arguments += [residual] if op == "linear_residual" else []
    position = len(arguments)
    arguments += [y, M, N, K, block, *([eps] if is_normed else [])]
    read = [a for a in arguments[:position] if isinstance(a, np.ndarray)]
    kind = f"{op} w{bits} {np.dtype(scales).name} block {block}{' symmetric' if symmetric else ''}"
    return Case(
        f"{kind} M={M} N={N} K={K}{' any' if any_kernel else ''}",
        ("linear", (OPS.index(op), bits, int(scales == np.float32), M, N, K, block, int(any_kernel))),
        tuple(arguments),
        {position: Expected(value, limit, HALF * (1 + is_normed))},
        sum(a.nbytes for a in read) + y.nbytes,
        M * N * K,
        ("linear", (M, N, K)),
    )


def _swiglu(sums: Array, limit: Array) -> tuple[Array, Array]:
    """silu(gate) * up with its limit: silu is nowhere steeper than 1.1, and exp is off by 2 + 1.2 |gate| units."""
    gate, up = np.split(sums, 2, axis=-1)
    gate_limit, up_limit = np.split(limit, 2, axis=-1)
    silu = gate / (1 + np.exp(-gate))
    value = silu * up
    limit = 1.1 * gate_limit * (np.abs(up) + up_limit) + np.abs(silu) * up_limit
    return value, limit + (8 + 1.2 * np.abs(gate)) * SINGLE * np.abs(value)


# --- the head -------------------------------------------------------------------------------------------------------
def top_of(logits: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """The k largest of [.., n] in falling order, of equal ones the lower id first; then -inf with -1."""
    logits = np.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, k)], constant_values=-np.inf)
    ids = np.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, k)], constant_values=-1)
    order = np.lexsort((ids & 0x7FFFFFFF, -logits), axis=-1)[..., :k]
    return np.take_along_axis(logits, order, -1), np.take_along_axis(ids, order, -1)


class HeadCase(Case):
    """Two close logits may change places within their limit, so which ids are largest is judged by the kernel's own
    logits, where it writes them."""

    def check(self, found: Sequence[Any]) -> float:
        """See `Case.check`; the lists of tiles must be exactly those of the logits."""
        worst = super().check(found)
        if found[6] is not None:
            check_top(*found[6:9])
        return worst


def head(
    B: int, V: int, K: int, *, first: int = 0, end: int | None = None, k: int = 5, bits: int = 4, block: int = 32,
    scales: Any = np.float16, symmetric: bool = False, with_logits: bool = True, seed: int = 0,
) -> HeadCase:  # fmt: skip
    """EdgeHead over rows first..end of the vocabulary, with logits or without."""
    random = np.random.default_rng(seed)
    end = V if end is None else end
    weight = random_weight(random, V, K, bits, block, scales, symmetric)
    x, norm, eps = half(random, B, K), half(random, K, size=0.5), 1e-6
    wide = normed(x, norm, eps)
    outside = (np.arange(V) < first) | (np.arange(V) >= end)
    value, limit = weight.product(wide, is_normed=True, rounds_weight=False)
    value = np.where(outside, -np.inf, value)
    tiles = -(-V // HEAD_TILE)
    logits = np.full((B, V), np.nan, np.float32) if with_logits else None
    tops = np.full((B, tiles, k), np.nan, np.float32), np.full((B, tiles, k), -2, np.int32)
    arguments = (x, norm, weight.codes, weight.scales, weight.zeros, np.array([first, end], np.int32), logits, *tops)

    padded = np.pad(value, ((0, 0), (0, tiles * HEAD_TILE - V)), constant_values=-np.inf).reshape(B, tiles, HEAD_TILE)
    limits = np.pad(limit, ((0, 0), (0, tiles * HEAD_TILE - V))).reshape(B, tiles, HEAD_TILE)
    best = -np.sort(-padded, -1)[..., :k]
    # A sorted list moves by no more than its largest entry does.
    outputs = {7: Expected(best, np.broadcast_to(limits.max(-1, keepdims=True), best.shape) + TINY, 2 * HALF)}
    if with_logits:
        outputs[6] = Expected(value, limit + TINY, 2 * HALF)
    share = (end - first) / V
    read = sum(a.nbytes for a in (weight.codes, weight.scales, weight.zeros)) * share
    return HeadCase(
        f"head w{bits} {np.dtype(scales).name} block {block} B={B} V={V} K={K} rows {first}..{end} k={k}",
        ("head", (bits, int(scales == np.float32), B, V, K, block, k)),
        (*arguments, B, V, K, block, k, eps),
        outputs,
        int(read) + x.nbytes + norm.nbytes + sum(a.nbytes for a in (logits, *tops) if a is not None),
        int(B * V * K * share),
        ("linear", (B, end - first, K)),
    )


def check_top(logits: Array, values: Array, ids: Array) -> None:
    """Each tile's list is exactly that of the kernel's own logits.

    Raises:
        AssertionError: an entry, its id or its place is another.
    """
    V = logits.shape[1]
    tiles, k = values.shape[1:]
    for tile in range(tiles):
        part = np.arange(tile * HEAD_TILE, min(V, (tile + 1) * HEAD_TILE), dtype=np.int32)
        own = logits[:, part]
        numbers = np.broadcast_to(np.where(np.isneginf(own[0]), -1, part), own.shape)
        expected = top_of(own, numbers, k)
        np.testing.assert_array_equal(values[:, tile], expected[0])
        np.testing.assert_array_equal(ids[:, tile], expected[1])


def merge_top(B: int, tiles: int, k: int, *, missing: float = 0.1, levels: int = 0, seed: int = 0) -> Case:
    """EdgeMergeTop; a share of the tiles is short, and with ``levels`` values are so many, so that most are equal."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((B, tiles, k)).astype(np.float32)
    if levels:
        logits = random.integers(0, levels, logits.shape).astype(np.float32)
    ids = np.stack([
        np.stack([np.sort(random.choice(HEAD_TILE, k, replace=False)) + HEAD_TILE * tile for tile in range(tiles)])
        for _ in range(B)
    ]).astype(np.int32)  # fmt: skip
    short = random.random((B, tiles)) < missing
    keep = np.arange(k) < np.where(short, random.integers(0, k + 1, (B, tiles)), k)[..., None]
    values, ids = top_of(np.where(keep, logits, -np.inf).astype(np.float32), np.where(keep, ids, -1), k)
    expected = top_of(values.reshape(B, -1), ids.reshape(B, -1), k)
    found = np.full((B, k), np.nan, np.float32), np.full((B, k), -2, np.int32)
    arrays = (values, np.ascontiguousarray(ids, np.int32), *found)
    return Case(
        f"merge_top B={B} tiles={tiles} k={k}",
        ("merge_top", (B, tiles, k)),
        (*arrays, B, tiles, k),
        {2: Expected(expected[0]), 3: Expected(expected[1])},
        sum(a.nbytes for a in arrays),
        0,
        ("topk", (B, tiles, k)),
    )
