"""Causal grouped-query attention over a fixed-capacity KV cache, with RoPE and the cache write inside.

The cache is [B, KV, C, D]; slot i holds the key of position i. The functional form (cache in, cache out) lets
every backend bind both to one buffer and write in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import fused_op


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split form (Su et al., 2021): x [B, S, H, D], cos and sin [B, S, D/2]; of x's dtype."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@fused_op({})
def rope_angles(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D] at ``positions`` [B, S], from tables [C, D/2]; both halves are the same."""
    at = positions.long()  # ONNX gathers by int64 alone
    cos, sin = cos[at], sin[at]
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def query_positions(last: Tensor, steps: int) -> Tensor:
    """Positions [B, S] of the S tokens whose newest is at ``last`` [B]."""
    return last.unsqueeze(-1) - (steps - 1) + torch.arange(steps, dtype=torch.int32, device=last.device)


def split_packed(query, key, value, heads, kv_heads):
    """(query, key, value), which may arrive as one packed tensor."""
    if key is not None:
        return query, key, value
    width = query.shape[-1] // (heads + 2 * kv_heads)
    return query.split([heads * width, kv_heads * width, kv_heads * width], -1)


def rotary_embedding(query, key, cos, sin, positions, heads, kv_heads):
    """RotaryEmbedding-23 of both."""
    at = positions.long()
    return tuple(
        onnx_ops.symbolic(
            "::RotaryEmbedding", [t, cos, sin, at], dict(num_heads=n), dtype=t.dtype, shape=t.shape, version=23
        )
        for t, n in ((query, heads), (key, kv_heads))
    )


#: ONNX Runtime's GroupQueryAttention rotates heads whose width is a multiple of this.
_ROTATED_WIDTH = 16


def _lower_group_query_attention(
    query,
    key,
    value,
    past_key,
    past_value,
    last,
    cos,
    sin,
    heads,
    kv_heads,
    scale,
    window,
    softcap,
    key_scale=None,
    value_scale=None,
):
    batch, steps = query.shape[:2]
    if cos is not None and past_key.shape[3] % _ROTATED_WIDTH:
        query, key, value = split_packed(query, key, value, heads, kv_heads)
        query, key = rotary_embedding(query, key, cos, sin, query_positions(last, steps), heads, kv_heads)
        cos = sin = None
    attributes = dict(num_heads=heads, kv_num_heads=kv_heads, scale=scale, do_rotary=int(cos is not None))
    if window > 0:
        attributes["local_window_size"] = window
    if softcap > 0:
        attributes["softcap"] = softcap
    inputs = [query, key, value, past_key, past_value, last, (last + 1).squeeze(0), cos, sin]
    if key_scale is not None:
        attributes |= dict(k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8)
        inputs += [None, None, None, key_scale, value_scale]
    out, new_key, new_value = onnx_ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=[query.dtype, past_key.dtype, past_value.dtype],
        shapes=[(batch, steps, heads * past_key.shape[3]), past_key.shape, past_value.shape],
        version=1,
    )
    return out, new_key, new_value


def _lower_standard(
    query,
    key,
    value,
    past_key,
    past_value,
    last,
    cos,
    sin,
    heads,
    kv_heads,
    scale,
    window,
    softcap,
    key_scale=None,
    value_scale=None,
):
    """RotaryEmbedding-23, TensorScatter-24 for the cache write and Attention-24 with a boolean mask."""
    query, key, value = split_packed(query, key, value, heads, kv_heads)
    batch, steps = query.shape[:2]
    capacity, width = past_key.shape[2:]
    positions = query_positions(last, steps)
    if cos is not None:
        query, key = rotary_embedding(query, key, cos, sin, positions, heads, kv_heads)
    start = (last - (steps - 1)).long()
    caches = []
    for cache, new, step in ((past_key, key, key_scale), (past_value, value, value_scale)):
        rows = new.reshape(batch, steps, kv_heads, width).transpose(1, 2)
        rows = rows if step is None else to_int8(rows, step)
        caches.append(
            onnx_ops.symbolic(
                "::TensorScatter",
                [cache, rows, start],
                dict(axis=2, mode="linear"),
                dtype=cache.dtype,
                shape=cache.shape,
                version=24,
            )
        )
    mask = visible(positions, capacity, window)
    attributes = dict(scale=scale)
    if softcap > 0:
        attributes["softcap"] = softcap
    rows = query.reshape(batch, steps, heads, width).transpose(1, 2)
    read = caches if key_scale is None else [caches[0].float() * key_scale, caches[1].float() * value_scale]
    out = onnx_ops.symbolic(
        "::Attention",
        [rows, *read, mask],
        attributes,
        dtype=query.dtype,
        shape=(batch, heads, steps, width),
        version=24,
    )
    return out.transpose(1, 2).reshape(batch, steps, heads * width), *caches


def to_int8(rows: Tensor, step: Tensor) -> Tensor:
    """Codes of an int8 cache: rows [B, KV, S, D] by steps [KV, 1, D], rounded half to even and clamped."""
    return torch.round(rows / step).clamp(-128, 127).to(torch.int8)


def visible(positions: Tensor, capacity: int, window: int) -> Tensor:
    """Boolean mask [B, 1, S, C]: which slots the queries at ``positions`` [B, S] may attend to."""
    slots = torch.arange(capacity, dtype=positions.dtype, device=positions.device)
    at = positions.unsqueeze(-1)
    mask = slots <= at
    if window > 0:
        mask = mask & (slots > at - window)
    return mask.unsqueeze(1)


def _supports(target: str, query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, *rest):
    batch, width = past_key.shape[0], past_key.shape[3]
    if target == "onnx/fused" and width % 8:
        return f"GroupQueryAttention takes heads whose width is a multiple of 8, not {width}"
    if target == "onnx/fused" and batch != 1:
        return f"GroupQueryAttention continues a cache by several tokens for one row alone, not {batch}"
    return None


@fused_op({"onnx/fused": _lower_group_query_attention, "onnx/standard": _lower_standard}, _supports)
def kv_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes S new keys and values into the cache and attends over all that is written.

    Args:
        query: [B, S, heads*D]; with key and value None the packed [B, S, (heads+2*kv_heads)*D] q, k, v rows.
        key, value: [B, S, kv_heads*D] or None.
        past_key, past_value: [B, kv_heads, C, D]; slots from the first new position on may hold anything.
        last: int32 [B], the position of the newest token; the S tokens end there.
        cos, sin: RoPE tables [C, D/2] applied to query and key here, or None where it is done before.
        window: how many newest positions a query sees (sliding window), 0 for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``, 0 for none.
        key_scale, value_scale: of an int8 cache, float [kv_heads, 1, D]: one step for each channel (GroupQueryAttention
            of ONNX Runtime has it so); None where the cache holds the values themselves.

    Returns:
        (output [B, S, heads*D], present key, present value), the last two shaped like the past.
    """
    query, key, value = split_packed(query, key, value, heads, kv_heads)
    batch, steps = query.shape[:2]
    capacity, width = past_key.shape[2:]
    positions = query_positions(last, steps)
    query = query.reshape(batch, steps, heads, width)
    key = key.reshape(batch, steps, kv_heads, width)
    value = value.reshape(batch, steps, kv_heads, width)
    if cos is not None:
        query, key = (rotate(t, cos[positions.long()], sin[positions.long()]) for t in (query, key))
    slots = positions.long()[:, None, :, None]
    index = slots.expand(batch, kv_heads, steps, width)
    rows = key.transpose(1, 2), value.transpose(1, 2)
    if key_scale is not None:
        rows = to_int8(rows[0], key_scale), to_int8(rows[1], value_scale)
    keys, values = past_key.scatter(2, index, rows[0]), past_value.scatter(2, index, rows[1])
    mask = visible(positions, capacity, window)
    # Slots never written may hold NaN, and 0 * NaN is NaN: clear what no query can see.
    seen = mask.any(2).unsqueeze(-1)
    read = keys, values
    if key_scale is not None:
        read = keys.to(query.dtype) * key_scale, values.to(query.dtype) * value_scale
    k, v = (torch.where(seen, held, 0).repeat_interleave(heads // kv_heads, 1) for held in read)
    scores = query.transpose(1, 2) @ k.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), -1, dtype=torch.float32).to(query.dtype)
    return (weights @ v).transpose(1, 2).reshape(batch, steps, heads * width), keys, values
