"""Which cases the benchmark of the CUDA kernels times: small language models, image and audio decoders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.bench_cuda_cases import Case, head, linear, merge_top
from tools.bench_cuda_cases_attention import attention, attention_merge
from tools.bench_cuda_cases_decoder import bias_activation, codebook, group_norm

#: plan -> the op in whose folder it is, where that is another name.
OP_OF = {"merge_top": "head", "attention_merge": "attention"}


@dataclass(frozen=True)
class Entry:
    """A case of the benchmark by its maker and sizes; ``tiny`` are sizes of the same kind that a CPU runs at once."""

    make: Callable[..., Case]
    sizes: tuple[Any, ...]
    tiny: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def full(self) -> Case:
        return self.make(*self.sizes, **self.options)

    def small(self) -> Case:
        return self.make(*self.tiny, **self.options)


def _linears() -> list[Entry]:
    """Qwen3-0.6B's and -1.7B's linears for one token, some for four and for a prefill of 256."""
    layers = {"norm_linear": (4096, 1024), "linear": (1024, 2048), "norm_linear_swiglu": (6144, 1024)}
    wide = {"norm_linear": (4096, 2048), "norm_linear_swiglu": (12288, 2048), "linear_residual": (2048, 6144)}
    entries = []
    for shapes, rows in ((layers, 1), (wide, 1), (wide, 4), (wide, 256)):
        for op, (N, K) in shapes.items():
            sizes, tiny = (rows, N, K), (min(rows, 6), 48, 256)
            entries.append(Entry(functools.partial(linear, op), sizes, tiny, {"block": 128}))
            if rows == 1:
                entries.append(Entry(functools.partial(linear, op), sizes, tiny, {"block": 32}))
    down = functools.partial(linear, "linear_residual")
    entries.append(Entry(down, (1, 1024, 3072), (1, 32, 192), {"block": 128}))
    entries += [
        Entry(down, (1, 2048, 6144), (1, 32, 192), {"bits": 8, "block": 6144, "scales": np.float32, "symmetric": True}),
        Entry(down, (1, 896, 4864), (1, 24, 192), {"block": 64}),
    ]
    return entries


def _attentions() -> list[Entry]:
    """Qwen3-0.6B's and -1.7B's (16 heads, 8 key heads of 128) with 2048 tokens seen: one step, four, a prefill."""
    entries = []
    for int8 in (False, True):
        for sizes, tiny, splits in (
            ((1, 1, 16, 8, 128, 4096, [2047]), (1, 1, 4, 2, 32, 40, [25]), 16),
            ((4, 1, 16, 8, 128, 4096, [2047] * 4), (2, 1, 4, 2, 32, 40, [25, 7]), 8),
            ((1, 256, 16, 8, 128, 4096, [2047]), (1, 6, 4, 2, 32, 40, [25]), 1),
        ):
            entries.append(Entry(attention, sizes, tiny, {"int8": int8, "splits": splits}))
    # Qwen2.5-0.5B's (14 heads, 2 key heads of 64); a long cache; one of which a window is visible.
    entries += [
        Entry(attention, (1, 1, 14, 2, 64, 4096, [2047]), (1, 1, 14, 2, 64, 40, [25]), {"splits": 16}),
        Entry(attention, (1, 1, 16, 8, 128, 16384, [8191]), (1, 1, 4, 2, 32, 40, [25]), {"splits": 32}),
        Entry(attention, (1, 1, 16, 8, 128, 16384, [8191]), (1, 1, 4, 2, 32, 40, [25]), {"splits": 16, "window": 1024}),
    ]
    return [*entries, Entry(attention_merge, (1, 1, 16, 128, 16), (1, 1, 4, 32, 3))]


BENCH: tuple[Entry, ...] = (
    *_linears(),
    Entry(head, (1, 151936, 1024), (1, 700, 128), {"k": 50, "block": 128}),
    Entry(head, (1, 151936, 2048), (1, 700, 128), {"k": 1, "block": 128, "with_logits": False}),
    Entry(functools.partial(head, first=300), (1, 16684, 1024), (1, 700, 128), {"k": 50}),
    Entry(merge_top, (1, 594, 50), (1, 20, 5)),
    *_attentions(),
    Entry(codebook, (1, 1, 1024, 256, 16384), (1, 1, 40, 24, 9)),
    Entry(codebook, (1, 16, 1500, 512, 2048), (2, 4, 33, 16, 5)),
    Entry(group_norm, (1, 128, 256 * 256, 32), (1, 8, 64, 4)),
    Entry(group_norm, (1, 128, 256 * 256, 32), (1, 2, 8192, 1), {"workspace": True}),
    Entry(group_norm, (1, 512, 64 * 64, 32), (1, 8, 64, 4)),
    Entry(bias_activation, (1, 256, 256 * 256, "silu"), (1, 8, 64, "silu")),
    Entry(bias_activation, (1, 96, 480_000, "snake"), (1, 8, 64, "snake")),
)
