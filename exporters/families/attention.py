"""Attention and cache: the two objects that transformers calls back during a capture."""

from __future__ import annotations

from torch import Tensor
from transformers import AttentionInterface

from exporters import ops
from exporters.families.unsupported import SUPPORTED, UnsupportedModule

#: Name under which transformers finds our attention.
ATTENTION = "edge"

#: What transformers hands to every attention and what a causal one with a cache does not need.
_IGNORED = ("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal")


class StateCache:
    """Hands key and value through unchanged: attention itself reads the past and writes the present."""

    is_compileable = False

    def __init__(self, past: list[Tensor], last: Tensor):
        self.past, self.present, self.last = past, list(past), last

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _edge_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    edge_cache=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """transformers' attention interface on top of ``edge::kv_attention``; query and key come with RoPE applied."""
    if unknown := sorted(name for name, value in kwargs.items() if name not in _IGNORED and value is not None):
        raise UnsupportedModule(
            f"attention takes {', '.join(unknown)}, which no fused form has",
            where=type(module).__name__,
            way_out=SUPPORTED,
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    rows = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
    at = 2 * module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out, edge_cache.present[at], edge_cache.present[at + 1] = ops.kv_attention(
        *rows,
        edge_cache.past[at],
        edge_cache.past[at + 1],
        edge_cache.last,
        None,
        None,
        heads,
        kv_heads,
        scale,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out, None


# With no mask function registered under this name transformers builds no mask: the op is causal by itself.
AttentionInterface.register(ATTENTION, _edge_attention)
