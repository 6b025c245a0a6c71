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


#: What a case names as its comparison -> contenders by name.
COMPARISONS: Mapping[str, Mapping[str, Comparison]] = {
    "linear": {
        "float16 matmul": Comparison(_matmul, lambda M, N, K: 2 * (M * K + N * K + M * N)),
        "int4 tinygemm": Comparison(_int4, lambda M, N, K: N * K // 2 + 4 * N * (K // 128)),
    },
    "topk": {"topk": Comparison(_topk, lambda batch, tiles, k: 4 * batch * tiles * k)},
}
