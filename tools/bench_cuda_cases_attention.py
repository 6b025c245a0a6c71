"""Cases of EdgeAttention and its merge: see bench_cuda_cases.py for what a case is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.bench_cuda_cases import HALF, SINGLE, TINY, Array, Case, Expected, half

#: A value of an int8 cache times its weight is multiplied by this before it is rounded to float16.
LIFT = 64


@dataclass(frozen=True)
class Rows:
    """Rows in float64, and by how much a kernel's may differ because a rounding fell the other way."""

    value: Array
    flip: Array

    def __getitem__(self, at: Any) -> Rows:
        return Rows(self.value[at], self.flip[at])


NOTHING = Expected(np.zeros(0))


@dataclass(frozen=True)
class AttentionCase(Case):
    """Partial sums are compared after they have been joined in float64; the cache by bits, but for its new rows.

    Attributes:
        partial: position of the partial sums among the arguments.
        joined: what they come to: [B, H, S, D].
        log_sum: log of the sum of exp(score), [B, H, S], and its limit.
        caches: position of a present -> (the new rows [B, KV, S, ...], mask of them).
    """

    partial: int = 0
    joined: Expected = NOTHING
    log_sum: Expected = NOTHING
    caches: tuple[tuple[int, Expected, Array], ...] = ()

    def check(self, found: Sequence[Any]) -> float:
        """See `Case.check`."""
        parts = np.asarray(found[self.partial], np.float64)
        tokens = self.joined.value.shape[2]
        sums, log_sum = join(parts if tokens == 1 else parts[:, :, :tokens], tokens)
        outputs = {0: self.joined, 1: self.log_sum}
        results = [sums, log_sum]
        for position, expected, mask in self.caches:
            got, before = np.asarray(found[position]), self.arguments[position]
            raw = np.uint16 if got.dtype == np.float16 else np.uint8
            np.testing.assert_array_equal(
                np.where(mask, raw(0), got.view(raw)), np.where(mask, raw(0), before.view(raw)), err_msg=self.name
            )
            outputs[len(results)] = expected
            results.append(np.where(mask, got, got.dtype.type(0)))
        return Case.check(replace_outputs(self, outputs), results)


def replace_outputs(case: Case, outputs: dict[int, Expected]) -> Case:
    """A plain case of the same name that expects other outputs."""
    return Case(case.name, case.plan, case.arguments, outputs, case.bytes, case.products)


def join(parts: Array, tokens: int) -> tuple[Array, Array]:
    """[B, H, P, D + 2] -> means [B, H, S, D] and the logs of the sums [B, H, S], in float64; nothing seen: 0, -inf."""
    sums, m, l = parts[..., :-2], parts[..., -2], parts[..., -1]  # noqa: E741
    most = m.max(2, keepdims=True) if tokens == 1 else m
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.where(np.isneginf(m), 0, np.exp(m - most))
        if tokens == 1:
            sums, total = (factor[..., None] * sums).sum(2, keepdims=True), (factor * l).sum(2, keepdims=True)
        else:
            sums, total = factor[..., None] * sums, factor * l
        return np.where(total[..., None] > 0, sums / total[..., None], 0), np.log(total) + most


# --- new rows -------------------------------------------------------------------------------------------------------
def rounded(x: Array, magnitude: Array) -> Rows:
    """x in float16; it may fall the other way where x is as near to a tie as float32 arithmetic is inexact.

    x is a sum of two products, whose magnitudes add up to ``magnitude``: three roundings, of half a unit each.
    """
    value = x.astype(np.float16).astype(np.float64)
    near = SINGLE * magnitude
    other = np.where(x > value, (x + near), (x - near)).astype(np.float16).astype(np.float64)
    return Rows(value, np.abs(other - value))


def turned(x: Array, cos: Array, sin: Array) -> Rows:
    """RoPE, half-split: x [B, S, heads, D] and tables [B, S, D / 2] in any float type."""
    a, b = np.split(x.astype(np.float64), 2, -1)
    c, s = cos.astype(np.float64)[:, :, None], sin.astype(np.float64)[:, :, None]
    products = [a * c, -b * s, b * c, a * s]
    x, size = (np.concatenate([p[0] + p[1], p[2] + p[3]], -1) for p in (products, [np.abs(p) for p in products]))
    return rounded(x, size)


def quantised(x: Rows) -> tuple[Rows, Array, Array]:
    """int8 by row: what the codes stand for, the codes and the float16 scales (the largest magnitude / 127)."""
    scales = (np.abs(x.value).max(-1) / 127).astype(np.float16)
    wide = scales.astype(np.float64)[..., None]
    exact = np.divide(x.value, wide, out=np.zeros_like(x.value), where=wide > 0)
    codes = np.clip(np.rint(exact), -127, 127)
    near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < np.where(x.flip > 0, 0.13, 1e-3)
    return Rows(codes * wide, near * wide), codes.astype(np.int8), scales


# --- cases ----------------------------------------------------------------------------------------------------------
def attention(
    B: int, S: int, H: int, KV: int, D: int, C: int, last: Sequence[int], *, int8: bool = False, window: int = 0,
    softcap: float = 0.0, splits: int = 1, any_kernel: bool = False, seed: int = 0,
) -> AttentionCase:  # fmt: skip
    """EdgeAttention; slots that no new token may see hold NaN, or codes with scales that are NaN."""
    random = np.random.default_rng(seed)
    qkv = half(random, B, S, (H + 2 * KV) * D)
    caches = [half(random, B, KV, C, D) for _ in range(2)]
    angles = random.uniform(0, 2 * np.pi, (C, D // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    newest = np.array(last, np.int32)
    scale = float(np.float32(1 / np.sqrt(D)))

    position = newest[:, None] - S + 1 + np.arange(S)  # [B, S]; before 0: nothing is written, nothing seen
    heads = qkv.reshape(B, S, H + 2 * KV, D)
    at = np.maximum(position, 0)
    query = turned(heads[:, :, :H], cos[at], sin[at])
    new = [turned(heads[:, :, H : H + KV], cos[at], sin[at]), rounded(heads[:, :, H + KV :].astype(float), np.zeros(1))]

    slots = np.arange(C)
    is_new = np.zeros((B, C), bool)
    for b, s in zip(*np.nonzero(position >= 0), strict=True):
        is_new[b, position[b, s]] = True
    seen = slots <= position[..., None]
    if window:
        seen &= slots > position[..., None] - window  # [B, S, C]
    hidden = ~seen.any(1) | is_new
    arrays, full, expected = [], [], []
    for cache, rows in zip(caches, new, strict=True):
        before, scales, parts = cache, None, [rows]
        if int8:
            stored, before, scales = quantised(Rows(cache.astype(float), np.zeros(1)))
            fresh, codes, fresh_scales = quantised(rows)
            step = fresh_scales.astype(float)
            parts = [Rows(codes.astype(float), np.rint(fresh.flip / np.maximum(step, 1e-9)[..., None])),
                     Rows(step, 1.01 * HALF * step + TINY)]  # fmt: skip
            all_rows = Rows(stored.value, np.zeros_like(stored.value))
            rows = fresh
        else:
            all_rows = Rows(cache.astype(float), np.zeros(cache.shape))
        targets = [before, *([scales] if scales is not None else [])]
        for target, part in zip(targets, parts, strict=True):
            if target.dtype == np.float16:
                target[np.broadcast_to(hidden[:, None], (B, KV, C))] = np.nan
            value, limit = np.zeros(target.shape), np.full(target.shape, TINY)
            for b, s in zip(*np.nonzero(position >= 0), strict=True):
                value[b, :, position[b, s]] = part.value[b, s]
                limit[b, :, position[b, s]] += part.flip[b, s]
            mask = np.broadcast_to(is_new[:, None], (B, KV, C))
            mask = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (target.ndim - 3)), target.shape)
            expected.append((Expected(value, limit), mask))
        for b, s in zip(*np.nonzero(position >= 0), strict=True):
            all_rows.value[b, :, position[b, s]] = rows.value[b, s]
            all_rows.flip[b, :, position[b, s]] = rows.flip[b, s]
        arrays.append(targets)
        full.append(all_rows)

    joined, log_sum = _attend(query, full[0], full[1], seen, scale, softcap, int8=int8, decode=S == 1)
    rows_out = max(S, splits)
    partial = np.full((B, H, rows_out, D + 2), np.nan, np.float32)
    (key, *key_scales), (value_cache, *value_scales) = arrays
    past = [key, value_cache, *key_scales, *value_scales]
    inputs = [qkv, *past, newest, cos, sin]
    arguments = (*inputs, partial, *(a.copy() for a in past), S, H, KV, D, C, window, splits, scale, float(softcap))
    first_cache = len(inputs) + 1
    order = [0, 2, 1, 3] if int8 else [0, 1]  # of expected: key, key scales, value, value scales
    read = int(seen.any(1).sum()) * KV * D * 2 * (1 if int8 else 2) + (int(seen.any(1).sum()) * KV * 4 if int8 else 0)
    return AttentionCase(
        f"attention {'i8' if int8 else 'f16'} B={B} S={S} H={H} KV={KV} D={D} C={C} last={list(last)}"
        f"{f' window {window}' if window else ''}{f' softcap {softcap}' if softcap else ''} splits {splits}"
        f"{' any' if any_kernel else ''}",
        ("attention", (int(int8), B, S, H, KV, D, C, splits, int(any_kernel))),
        arguments,
        dict.fromkeys([len(inputs), *range(first_cache, first_cache + len(past))], NOTHING),
        read + qkv.nbytes + 4 * B * H * rows_out * (D + 2),
        2 * int(seen.sum()) * H * D,
        ("attention", (B, S, H, KV, D, C)),
        aliases={1 + i: first_cache + i for i in range(len(past))},
        partial=len(inputs),
        joined=joined,
        log_sum=log_sum,
        caches=tuple((first_cache + i, *expected[j]) for i, j in enumerate(order)),
    )


def _attend(
    query: Rows, key: Rows, value: Rows, seen: Array, scale: float, softcap: float, *, int8: bool, decode: bool
):
    """The float64 answer [B, H, S, D] and the log of each sum, with their limits.

    A score is off by roundings that fell the other way (`Rows.flip`) and by float32's of D products; softmax turns a
    difference of d in all scores into at most exp(2 d) - 1 of the weighted magnitudes. A weight has __expf's error,
    2 + 1.2 |x| units; it is rounded to float16 (u) where there are several tokens, to a pair of halves (u^2) where
    there is one; below float16's smallest number it is off by TINY.
    """
    B, S, H, D = query.value.shape
    KV, group = key.value.shape[1], H // key.value.shape[1]
    shape = (B, KV, group, S, D)
    q, q_flip = (a.transpose(0, 2, 1, 3).reshape(shape) for a in (query.value, query.flip))
    mask = seen[:, None, None]
    visible = seen.any(1)[:, None, :, None]
    k, k_flip, v, v_flip = (np.where(visible, a, 0) for a in (key.value, key.flip, value.value, value.flip))
    dot = np.einsum("bkgsd,bkcd->bkgsc", q, k) * scale
    size = np.einsum("bkgsd,bkcd->bkgsc", np.abs(q), np.abs(k)) * scale
    off = np.einsum("bkgsd,bkcd->bkgsc", q_flip, np.abs(k)) + np.einsum("bkgsd,bkcd->bkgsc", np.abs(q) + q_flip, k_flip)
    off = off * scale + (D + 8) * SINGLE * size
    score = softcap * np.tanh(dot / softcap) if softcap else dot
    off = off + 4 * SINGLE * (np.abs(score) + softcap)
    score, off = np.where(mask, score, -np.inf), np.where(mask, off, 0)
    most = score.max(-1, keepdims=True)
    floor = np.where(np.isneginf(most), 0, most)
    weight = np.exp(score - floor)
    total = weight.sum(-1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    d = (
        off.max(-1, keepdims=True)
        + 2 * SINGLE
        + 1.2 * SINGLE * np.max(np.where(mask, floor - score, 0), -1, keepdims=True)
    )
    spread = np.einsum("bkgsc,bkcd->bkgsd", share, np.abs(v))
    relative = np.expm1(2 * d) + (seen.shape[-1] + 8) * SINGLE + (HALF**2 if decode else 2.01 * HALF)
    step = TINY * (1 / LIFT if int8 else 1)
    # The lifted weight is p * scale and meets codes, up to 127 for a value of 127 scales.
    units = np.where(visible, 127.0, 0).sum(2)[:, :, None, None] if int8 else np.abs(v).sum(2)[:, :, None, None]
    limit = relative * spread + np.einsum("bkgsc,bkcd->bkgsd", share, v_flip) + step * units + TINY
    out = np.einsum("bkgsc,bkcd->bkgsd", share, v).reshape(B, H, S, D)
    with np.errstate(divide="ignore"):
        log_sum = (np.log(total) + most)[..., 0].reshape(B, H, S)
    log_limit = np.broadcast_to(2 * d + (seen.shape[-1] + 8) * SINGLE + (0 if decode or int8 else HALF), most.shape)
    return Expected(out, limit.reshape(B, H, S, D)), Expected(log_sum, log_limit[..., 0].reshape(B, H, S))


def attention_merge(B: int, S: int, H: int, D: int, rows: int, *, empty: float = 0.3, seed: int = 0) -> Case:
    """EdgeAttentionMerge; a share of the splits saw nothing."""
    random = np.random.default_rng(seed)
    partial = random.standard_normal((B, H, rows, D + 2)).astype(np.float32)
    partial[..., -2] *= 8
    partial[..., -1] = random.uniform(1, 50, partial.shape[:-1])
    if S == 1:
        blank = random.random((B, H, rows)) < empty
        blank[:, :, -1] = False
        partial[blank] = [*[0] * D, -np.inf, 0]
    else:
        partial[:, :, S:] = np.nan
        partial[:, :, 0] = [*[0] * D, -np.inf, 0]  # a token at a position before the first
    wide = partial.astype(np.float64) if S == 1 else partial[:, :, :S].astype(np.float64)
    value = join(wide, S)[0].transpose(0, 2, 1, 3).reshape(B, S, H * D)
    size = join(np.concatenate([np.abs(wide[..., :-2]), wide[..., -2:]], -1), S)[0]
    size = size.transpose(0, 2, 1, 3).reshape(B, S, H * D)
    finite = partial[..., -2][np.isfinite(partial[..., -2])]
    spread = float(finite.max() - finite.min()) if S == 1 else 0.0
    limit = (rows + 8 + 1.2 * spread) * SINGLE * 2 * size + HALF * np.abs(value) + TINY
    out = np.full((B, S, H * D), np.nan, np.float16)
    return Case(
        f"attention_merge B={B} S={S} H={H} D={D} rows={rows}",
        ("attention_merge", (B, S, H, D, rows)),
        (partial, out, S, H, D, rows),
        {1: Expected(value, limit)},
        wide.size * 4 + out.nbytes,
        wide.size,
    )
