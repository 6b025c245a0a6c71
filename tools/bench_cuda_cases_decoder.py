"""Cases of the VQ decoders' kernels: see bench_cuda_cases.py for what a case is."""

from __future__ import annotations

import numpy as np

from tools.bench_cuda_cases import HALF, SINGLE, TINY, Array, Case, Expected, half


def codebook(B: int, Q: int, T: int, C: int, size: int, *, outside: bool = False, seed: int = 0) -> Case:
    """EdgeCodebook; with ``outside`` some codes name no entry, and their positions are NaN in every channel."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (B, Q, T), dtype=np.int32)
    tables = half(random, Q * size, C)
    if outside:
        codes[:, 0, ::5], codes[:, -1, 2::5] = -1, size
    bad = ((codes < 0) | (codes >= size)).any(1)
    rows = np.clip(codes, 0, size - 1) + size * np.arange(Q)[:, None]
    found = tables[rows].astype(np.float64)  # [B, Q, T, C]
    value = found.sum(1).transpose(0, 2, 1)
    # Q additions in float32, then one rounding to float16.
    limit = Q * SINGLE * np.abs(found).sum(1).transpose(0, 2, 1) + HALF * np.abs(value) + TINY
    value = np.where(bad[:, None], np.nan, value)
    y = np.full((B, C, T), np.inf, np.float16)
    entries = min(Q * size, B * Q * T)  # a table is read once at most: it stays in the L2 cache
    return Case(
        f"codebook B={B} Q={Q} T={T} C={C} size={size}{' with codes outside' if outside else ''}",
        ("codebook", (B, Q, T, C, size)),
        (codes, tables, y, B, Q, T, C, size),
        {2: Expected(value, None if outside else limit)},
        codes.nbytes + entries * C * 2 + y.nbytes,
        0,
        ("codebook", (B, Q, T, C, size)),
    )


def group_norm(
    B: int, C: int, N: int, groups: int, *, silu: bool = True, workspace: bool = False, mean: float = 0.0,
    wave: float = 0.0, seed: int = 0,
) -> Case:  # fmt: skip
    """EdgeGroupNormSilu; ``mean`` moves all of x, ``wave`` is a slow change along each group."""
    random = np.random.default_rng(seed)
    slow = wave * np.sin(np.linspace(0, 9, C * N)).reshape(C, N)
    x = (random.standard_normal((B, C, N)) + mean + slow).astype(np.float16)
    weight, bias, eps = half(random, C), half(random, C), 1e-6
    grouped = x.astype(np.float64).reshape(B, groups, -1)
    centre = grouped.mean(-1, keepdims=True)
    root = np.sqrt(grouped.var(-1, keepdims=True) + eps)
    scaled = ((grouped - centre) / root).reshape(B, C, N)
    size = (np.abs(grouped).max(-1, keepdims=True) / root * np.ones_like(grouped)).reshape(B, C, N)
    w = np.abs(weight.astype(np.float64))[:, None]
    z = scaled * weight.astype(np.float64)[:, None] + bias.astype(np.float64)[:, None]
    # The mean is joined from as many means as a thread has, 32 of a warp and 32 warps: a rounding of the mean's size
    # each; the sum of squares is as good relative to itself. Then subtraction, root, two products and a sum.
    steps = -(-C // groups * N // 8192) + 30
    limit = steps * SINGLE * w * (size + np.abs(scaled)) + 4 * SINGLE * np.abs(z)
    value, limit = silu_of(z, limit) if silu else (z, limit)
    y = np.full((B, C, N), np.nan, np.float16)
    partial = np.full((B * groups, 32, 2), np.nan, np.float32)
    return Case(
        f"group_norm B={B} C={C} N={N} groups={groups}{' silu' if silu else ''}{f' mean {mean}' if mean else ''}"
        f"{' workspace' if workspace else ''}",
        ("group_norm", (B, C, groups, N, int(workspace))),
        (x, weight, bias, y, *([partial] if workspace else []), C, groups, N, int(silu), eps),
        {3: Expected(value, limit + HALF * np.abs(value) + TINY)},
        x.nbytes + y.nbytes + weight.nbytes + bias.nbytes,
        0,
        ("group_norm", (B, C, N, groups)),
    )


def bias_activation(B: int, C: int, N: int, activation: str, *, size: float = 3.0, seed: int = 0) -> Case:
    """EdgeBiasActivation, "silu" or "snake"; ``size``: standard deviation of x."""
    random = np.random.default_rng(seed)
    x, bias = half(random, B, C, N, size=size), half(random, C)
    z = x.astype(np.float64) + bias.astype(np.float64)[:, None]
    limit = SINGLE * np.abs(z)
    if activation == "silu":
        value, limit = silu_of(z, limit)
    else:
        # The sine after its reduction is off by 2^-21 and the reduction's last rounding; its square twice as much.
        value, limit = z + np.sin(z) ** 2, 2 * limit + 4 * 2.0**-21
    y = np.full((B, C, N), np.nan, np.float16)
    return Case(
        f"bias_activation {activation} B={B} C={C} N={N}",
        ("bias_activation", (B, C, N, 1 if activation == "silu" else 2)),
        (x, bias, y, B * C, C, N, 1 if activation == "silu" else 2),
        {2: Expected(value, limit + HALF * np.abs(value) + TINY)},
        x.nbytes + y.nbytes + bias.nbytes,
        0,
        ("bias_activation", (B, C, N, 1 if activation == "silu" else 2)),
    )


def silu_of(z: Array, limit: Array) -> tuple[Array, Array]:
    """silu with the limit of its value: nowhere steeper than 1.1; exp is off by 2 + 1.2 |z| units, the rest by 4."""
    with np.errstate(over="ignore"):  # far below zero it is zero
        value = z / (1 + np.exp(-z))
    return value, 1.1 * limit + (8 + 1.2 * np.abs(z)) * SINGLE * np.abs(value)
