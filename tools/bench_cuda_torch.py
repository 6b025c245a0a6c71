"""torch's own ways to do what a CUDA kernel does, for tools/bench_cuda.py: the same sizes, arrays of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One contender: ``make(torch, *sizes)`` gives a call on fresh arrays, ``bytes(*sizes)`` what the call reads.

    Making or calling raises RuntimeError where this torch or this device cannot.
    """

    make: Callable[..., Callable[[], Any]]
    bytes: Callable[..., int]


def _matmul(torch: Any, M: int, N: int, K: int) -> Callable[[], Any]:
    x, weight = torch.randn(M, K, device="cuda").half(), torch.randn(N, K, device="cuda").half()
    return lambda: torch.nn.functional.linear(x, weight)


def _int4(torch: Any, M: int, N: int, K: int) -> Callable[[], Any]:
    """tinygemm: bfloat16 x, int4 codes in groups of 128 with bfloat16 scales and zeros."""
    group = 128
    if N % 8 or K % group:
        raise NotImplementedError(f"tinygemm takes N in eights and K in groups of {group}")
    x = torch.randn(M, K, device="cuda").bfloat16()
    codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(K // group, N, 2, device="cuda").bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _topk(torch: Any, batch: int, tiles: int, k: int) -> Callable[[], Any]:
    values = torch.randn(batch, tiles * k, device="cuda")
    return lambda: torch.topk(values, k)


def _attention(torch: Any, B: int, S: int, H: int, KV: int, D: int, C: int) -> Callable[[], Any]:
    """scaled_dot_product_attention over half of the cache (what the cases have seen), in float16."""
    seen = C // 2
    query = torch.randn(B, H, S, D, device="cuda").half()
    key, value = (torch.randn(B, KV, seen, D, device="cuda").half() for _ in range(2))
    mask = torch.ones(S, seen, device="cuda", dtype=torch.bool).tril(seen - S) if S > 1 else None
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, value, attn_mask=mask, enable_gqa=True)


def _codebook(torch: Any, B: int, Q: int, T: int, C: int, size: int) -> Callable[[], Any]:
    codes = torch.randint(0, size, (B, Q, T), device="cuda") + size * torch.arange(Q, device="cuda")[:, None]
    tables = torch.randn(Q * size, C, device="cuda").half()
    return lambda: torch.nn.functional.embedding(codes, tables).sum(1).transpose(1, 2).contiguous()


def _group_norm(torch: Any, B: int, C: int, N: int, groups: int) -> Callable[[], Any]:
    x, weight, bias = (torch.randn(*shape, device="cuda").half() for shape in ((B, C, N), (C,), (C,)))
    return lambda: torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, weight, bias))


def _activation(torch: Any, B: int, C: int, N: int, activation: int) -> Callable[[], Any]:
    x, bias = torch.randn(B, C, N, device="cuda").half(), torch.randn(C, 1, device="cuda").half()
    if activation == 1:
        return lambda: torch.nn.functional.silu(x + bias)
    return lambda: (z := x + bias) + torch.sin(z) ** 2


#: What a case names as its comparison -> contenders by name.
COMPARISONS: Mapping[str, Mapping[str, Comparison]] = {
    "linear": {
        "float16 matmul": Comparison(_matmul, lambda M, N, K: 2 * (M * K + N * K + M * N)),
        "int4 tinygemm": Comparison(_int4, lambda M, N, K: N * K // 2 + 4 * N * (K // 128)),
    },
    "attention": {
        "SDPA": Comparison(_attention, lambda B, S, H, KV, D, C: 2 * B * D * (KV * C + 2 * S * H)),
    },
    "codebook": {"embedding and sum": Comparison(_codebook, lambda B, Q, T, C, size: 2 * B * Q * T * C)},
    "group_norm": {"group_norm, silu": Comparison(_group_norm, lambda B, C, N, groups: 4 * B * C * N)},
    "bias_activation": {"eager": Comparison(_activation, lambda B, C, N, activation: 4 * B * C * N)},
    "topk": {"topk": Comparison(_topk, lambda batch, tiles, k: 4 * batch * tiles * k)},
}
