"""TensorRT's column: how each fused op reads in the strongly typed ONNX that its parser takes.

Three targets (see GENERATIONS in exporters/tensorrt_.py for who gets which):
    decomposed  standard operators of opset 21 alone; attention gives back the new rows of the cache ("delta")
    native      RMSNormalization, RotaryEmbedding, and TensorRT's own KV cache update and attention
    fused       our kernels as nodes of domain "edge" (kernels/cuda), everything else as in decomposed

Quantised products and lookups leave as nodes of domain "edge.build", which exporters/passes spells out in standard
operators once the weights' types can be written: PyTorch has no 4-bit tensor to trace them with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters import ops
from exporters.encodings import ENCODINGS
from exporters.ops._registry import BUILD
from exporters.ops.aten import ATEN, aten_lowerings
from exporters.ops.kv_attention import query_positions, rotary_embedding, rotate, split_packed, visible
from exporters.ops.table_linear import lower_product

#: Domain of TensorRT's own operators, and of our kernels.
TRT, EDGE = "trt", "edge"
#: Attributes of every node of ours, by which TensorRT's parser finds the plugin.
PLUGIN = {"plugin_namespace": EDGE, "plugin_version": "1"}
#: Where codes, scales, zero points and bias begin among the inputs of our nodes.
WEIGHTS_AT = {"EdgeLinear": 1, "EdgeLinearResidual": 1, "EdgeNormLinear": 2, "EdgeNormLinearSwiglu": 2, "EdgeHead": 2}
#: Positions of the cache that one part of a decode step's attention covers, and parts at most.
SPLIT, MOST_SPLITS = 128, 64


def _node(name: str, inputs, attributes, dtype, shape, version: int = 1) -> Tensor:
    return onnx_ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)


def _product(x, codes, scales, zeros, bias, bits, columns):
    shape = (*x.shape[:-1], codes.shape[0])
    y = _node(f"{BUILD}::Product", [x, codes, scales, zeros], dict(bits=bits, columns=columns), x.dtype, shape)
    return y if bias is None else y + bias


def _lookup(ids, codes, scales, zeros, bits, columns):
    attributes = dict(bits=bits, columns=columns)
    return _node(f"{BUILD}::Lookup", [ids, codes, scales, zeros], attributes, torch.float32, (*ids.shape, columns))


def _table_lookup(ids, codes, scales, encoding, columns):
    attributes = dict(bits=ENCODINGS[encoding].bits, columns=columns, encoding=encoding)
    return _node(f"{BUILD}::Lookup", [ids, codes, scales, None], attributes, torch.float32, (*ids.shape, columns))


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[B, S, heads*D] -> [B, heads, S, D]."""
    return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)


def _attend(query: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], scale: float, softcap: float) -> Tensor:
    """Attention over several stretches of keys and values without joining them: a cache is read where it lies.

    Args:
        query: [B, H, S, D]; H is a multiple of KV, and the heads of one group follow each other.
        parts: keys and values [B, KV, n, D], and which of them are visible [B, 1, S, n].

    Returns:
        [B, S, H*D].
    """
    batch, heads, steps, width = query.shape
    kv_heads = parts[0][0].shape[1]
    group = heads // kv_heads
    # The heads of a group are further rows of one product: its keys are read once, not copied for each head.
    rows = (query * scale).reshape(batch, kv_heads, group * steps, width)
    scores = [
        (rows @ keys.transpose(2, 3)).reshape(batch, kv_heads, group, steps, keys.shape[2]) for keys, _, _ in parts
    ]
    all_scores = torch.cat(scores, -1).float()  # the softmax is computed in float32
    if softcap > 0:
        all_scores = softcap * torch.tanh(all_scores / softcap)
    mask = torch.cat([mask.expand(batch, 1, steps, mask.shape[3]) for _, _, mask in parts], -1)
    weights = torch.softmax(all_scores.masked_fill(~mask.unsqueeze(2), float("-inf")), -1).to(query.dtype)
    total, first = None, 0
    for _, values, _ in parts:
        share = weights[..., first : first + values.shape[2]].reshape(batch, kv_heads, group * steps, values.shape[2])
        total = share @ values if total is None else total + share @ values
        first = first + values.shape[2]
    return total.reshape(batch, heads, steps, width).transpose(1, 2).reshape(batch, steps, heads * width)


def _attention_delta(query, key, value, past_key, past_value, last, cos, sin, heads, kv_heads, scale, window, softcap):
    """Past and new rows are attended to side by side; what comes out as the cache is its S new rows."""
    query, key, value = split_packed(query, key, value, heads, kv_heads)
    steps, capacity = query.shape[1], past_key.shape[2]
    positions = query_positions(last, steps)
    if cos is not None:
        tables = torch.embedding(cos, positions), torch.embedding(sin, positions)
        query, key = (
            rotate(t.reshape(*t.shape[:2], n, -1), *tables).flatten(2) for t, n in ((query, heads), (key, kv_heads))
        )
    slots = torch.arange(capacity, dtype=positions.dtype)
    at = positions[:, None, :, None]
    held = (slots < positions[:, None, :1, None]) & (slots > at - window if window > 0 else slots >= 0)
    steps_new = torch.arange(steps, dtype=positions.dtype)
    new = steps_new <= steps_new[:, None]
    if window > 0:
        new = new & (steps_new > steps_new[:, None] - window)
    keys, values = _heads(key, kv_heads), _heads(value, kv_heads)
    parts = [(past_key, past_value, held), (keys, values, new[None, None])]
    return _attend(_heads(query, heads), parts, scale, softcap), keys, values


def _attention_native(query, key, value, past_key, past_value, last, cos, sin, heads, kv_heads, scale, window, softcap):
    """TRT_KVCacheUpdate and TRT_Attention, whose query is scaled beforehand; the cache is updated in place."""
    query, key, value = split_packed(query, key, value, heads, kv_heads)
    batch, steps = query.shape[:2]
    positions = query_positions(last, steps)
    if cos is not None:
        query, key = rotary_embedding(query, key, cos, sin, positions, heads, kv_heads)
    start = last - (steps - 1)
    keys, values = (
        _node(f"{TRT}::TRT_KVCacheUpdate", [past, _heads(new, kv_heads), start], {}, past.dtype, past.shape)
        for past, new in ((past_key, key), (past_value, value))
    )
    rows = _heads(query, heads)
    if window > 0 or softcap > 0:  # for which the native operator has no attribute
        mask = visible(positions, past_key.shape[2], window)
        return _attend(rows, [(keys, values, mask)], scale, softcap), keys, values
    out = _node(
        f"{TRT}::TRT_Attention",
        [rows * scale, keys, values, None, None, last + 1],
        dict(causal_kind="lower_right"),
        query.dtype,
        rows.shape,
    )
    return out.transpose(1, 2).reshape(batch, steps, -1), keys, values


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """GroupNormalization-21, whose scale and bias are per channel."""
    channels = x.shape[1]
    weight = torch.ones(channels, dtype=x.dtype) if weight is None else weight
    bias = torch.zeros(channels, dtype=x.dtype) if bias is None else bias
    attributes = dict(num_groups=groups, epsilon=eps, stash_type=1)
    return _node("::GroupNormalization", [x, weight, bias], attributes, x.dtype, x.shape, version=21)


def _instance_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """The same by InstanceNormalization over [B, groups, rest], for parsers without GroupNormalization-21."""
    ones, zeros = torch.ones(groups, dtype=x.dtype), torch.zeros(groups, dtype=x.dtype)
    flat = x.reshape(x.shape[0], groups, -1)
    normed = _node("::InstanceNormalization", [flat, ones, zeros], dict(epsilon=eps), x.dtype, flat.shape, version=6)
    normed = normed.reshape(x.shape)
    if weight is None:
        return normed
    affine = (1, -1, *[1] * (x.dim() - 2))
    return normed * weight.reshape(affine) + bias.reshape(affine)


def _kernel(name: str, inputs, attributes, dtype, shape) -> Tensor:
    return _node(f"{EDGE}::{name}", inputs, {**attributes, **PLUGIN}, dtype, shape)


def _projection(x, norm, codes, scales, zeros, bias, residual, bits, columns, eps, gated):
    """The kernel for what stands around the product; a residual behind a norm or a gate is added by itself."""
    rows, _, width = codes.shape
    attributes = dict(bits=bits, block=8 * width // bits)
    weights = [codes, scales, zeros, bias]
    if norm is None and gated:
        joined = _kernel("EdgeLinear", [x, *weights], attributes, x.dtype, (*x.shape[:-1], rows))
        return _plus(ops.swiglu.reference(joined), residual)
    if norm is None and residual is not None:
        inputs = [x, *weights, residual]
        return _kernel("EdgeLinearResidual", inputs, attributes, x.dtype, (*x.shape[:-1], rows))
    if norm is None:
        return _kernel("EdgeLinear", [x, *weights], attributes, x.dtype, (*x.shape[:-1], rows))
    name, size = ("EdgeNormLinearSwiglu", rows // 2) if gated else ("EdgeNormLinear", rows)
    y = _kernel(name, [x, norm, *weights], attributes | dict(eps=eps), x.dtype, (*x.shape[:-1], size))
    return _plus(y, residual)


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _attention_kernel(query, key, value, past_key, past_value, last, cos, sin, heads, kv_heads, scale, window, softcap):
    """EdgeAttention, whose parts EdgeAttentionMerge joins: a decode step spreads the cache over the whole GPU."""
    packed = query if key is None else torch.cat([query, key, value], -1)
    batch, steps = packed.shape[:2]
    capacity, width = past_key.shape[2:]
    if cos is None:  # a rotation by nothing
        cos = torch.ones(capacity, width // 2)
        sin = torch.zeros(capacity, width // 2)
    splits = max(1, min(MOST_SPLITS, capacity // SPLIT))
    numbers = dict(heads=heads, kv_heads=kv_heads, scale=scale, window=window, softcap=softcap, splits=splits)
    parts = torch.sym_max(steps, splits)
    partial, keys, values = onnx_ops.symbolic_multi_out(
        f"{EDGE}::EdgeAttention",
        [packed, past_key, past_value, last, cos, sin],
        {**numbers, **PLUGIN},
        dtypes=[torch.float32, past_key.dtype, past_value.dtype],
        shapes=[(batch, heads, parts, width + 2), past_key.shape, past_value.shape],
        version=1,
    )
    out = _kernel(
        "EdgeAttentionMerge", [partial, packed], dict(heads=heads), packed.dtype, (batch, steps, heads * width)
    )
    return out, keys, values


def _codebook_kernel(codes, tables, size):
    shape = (codes.shape[0], tables.shape[1], *codes.shape[2:])
    return _kernel("EdgeCodebook", [codes, tables], dict(size=size), tables.dtype, shape)


def _group_norm_kernel(x, weight, bias, groups, eps):
    return _kernel("EdgeGroupNormSilu", [x, weight, bias], dict(groups=groups, eps=eps, silu=1), x.dtype, x.shape)


def _bias_snake_kernel(x, bias):
    return _kernel("EdgeBiasActivation", [x, bias], dict(activation=2), x.dtype, x.shape)


_COMMON: Mapping[str, Callable] = {
    "quantized_linear": _product,
    "quantized_embedding": _lookup,
    "table_embedding": _table_lookup,
    "codebook_lookup": ops.codebook_lookup.lowerings["onnx/standard"],
}
_DECOMPOSED = {**_COMMON, "kv_attention": _attention_delta, "table_linear": lower_product({})}
_NATIVE = {
    **_COMMON,
    "kv_attention": _attention_native,
    # FLOAT8E4M3FN alone: E5M2 is no type of TensorRT's, and FP4 one of some GPUs (sm_120).
    "table_linear": lower_product({"float8_e4m3fn": "DequantizeLinear"}),
    "rms_norm": ops.rms_norm.lowerings["onnx/standard"],
    "add_rms_norm": ops.add_rms_norm.lowerings["onnx/standard"],
}
_FUSED = {
    **_COMMON,
    "projection": _projection,
    "kv_attention": _attention_kernel,
    "table_linear": lower_product({}),
    "codebook_lookup": _codebook_kernel,
    "group_norm_silu": _group_norm_kernel,
    "bias_snake": _bias_snake_kernel,
}
TARGETS: Mapping[str, Mapping[str, Callable]] = {"decomposed": _DECOMPOSED, "native": _NATIVE, "fused": _FUSED}


def lowerings(target: str, group_norm: bool) -> dict[object, Callable]:
    """Operator -> decomposition for ``target``; an op that it does not name falls back to its reference.

    Args:
        group_norm: whether the parser takes GroupNormalization-21.
    """
    column = TARGETS[target]
    table: dict[object, Callable] = {op.overload: column.get(name, op.reference) for name, op in ops.REGISTRY.items()}
    table |= aten_lowerings("onnx/standard")
    table[ATEN.group_norm.default] = _group_norm if group_norm else _instance_norm
    return table
