"""TVM's column of lowerings: each op as one call of a C++ kernel (kernels/tvm) that is linked into the artifact.

A kernel takes borrowed tensors, numbers, the Program's name of the node, and its outputs last. Convolutions take what
stands around them along: normalisation, activation, nearest upsampling and padding in front, residual sum and
activation behind. What was taken along is left without a user, so dead-code elimination removes its own call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from exporters import cpu_layout, ops, tvm_fusion
from exporters.blocks import unpack_bits
from exporters.cpu_layout import CHANNEL_PANEL, PANEL
from exporters.errors import ExportError
from exporters.ops import tvm_tables
from exporters.tvm_fusion import Activation, ConvPlan, arguments

if TYPE_CHECKING:
    from exporters.tvm_import import Emitter

ATEN = torch.ops.aten
WIDEN = "Capture the language model with float32 states, or choose another backend with --backends."
#: (the graph's emitter, node) -> the relax expression of its value
Lowering = Callable[["Emitter", fx.Node], Any]


def _quantized_weight(emit: Emitter, given: Mapping[str, Any]) -> tuple[list[Any], int]:
    """Codes, scales and zero points in the kernels' layout; and columns per block."""
    rows, blocks, width = given["codes"].meta["val"].shape
    bits, panels = given["bits"], -(-rows // PANEL)
    block = width * 8 // bits
    parts = [
        emit.weight(
            given["codes"], "panels", "uint32", (panels, blocks * block * bits // 32, PANEL),
            lambda codes: cpu_layout.pack_quantized(codes, np.zeros(codes.shape[:2]), None, bits).codes,
        ),
        emit.weight(given["scales"], "panels", "float32", (panels, blocks, PANEL), cpu_layout.pack_linear),
        emit.weight(
            given["zeros"], "panels", "uint8", (panels, blocks, PANEL),
            lambda zeros: cpu_layout.pack_linear(unpack_bits(zeros, bits, blocks)),
        ),
    ]  # fmt: skip
    return parts, block


def _quantized_linear(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    x = emit.float32(given["x"])
    weight, block = _quantized_weight(emit, given)
    shape = (*emit.shape(x)[:-1], given["codes"].meta["val"].shape[0])
    numbers = (given["bits"], block, int(emit.fast))
    y = emit.call("edge_quantized_linear", [x, *weight, emit.value(given["bias"]), *numbers], [shape], node)
    return emit.like(y, given["x"])


def _quantized_embedding(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    ids = emit.integer(given["ids"])
    weight, block = _quantized_weight(emit, given)
    numbers = (given["codes"].meta["val"].shape[0], given["bits"], block)
    shape = (*emit.shape(ids), given["columns"])
    return emit.call("edge_quantized_embedding", [ids, *weight, *numbers], [shape], node)


def _linear(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    if not emit.is_constant(given["weight"]):
        return emit.default(node)
    rows, columns = given["weight"].meta["val"].shape
    x = emit.float32(given["input"])
    panels = (-(-rows // PANEL), columns, PANEL)
    weight = emit.weight(given["weight"], "panels", "float32", panels, cpu_layout.pack_linear)
    shape = (*emit.shape(x)[:-1], rows)
    return emit.call("edge_linear", [x, weight, emit.value(given["bias"])], [shape], node)


def refused_cache(dtype: str) -> str | None:
    """Why a KV cache of a type cannot be written in place, or None."""
    return None if dtype == "float32" else f"edge::kv_attention takes float32 caches, not {dtype}"


def _kv_attention(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    if (reason := refused_cache(str(given["past_key"].meta["val"].dtype).removeprefix("torch."))) is not None:
        raise ExportError(f"node {node.name}: {reason}", where=f"{emit.program.entry} for tvm", way_out=WIDEN)
    packed = given["key"] is None
    rows = [emit.float32(given[name]) for name in (("query",) if packed else ("query", "key", "value"))]
    caches = [emit.value(given[name]) for name in ("past_key", "past_value")]
    batch, steps = emit.shape(rows[0])[:2]
    width = given["past_key"].meta["val"].shape[3]
    numbers = emit.numbers(given["heads"], given["kv_heads"], given["window"])
    tables = [emit.value(given[name]) for name in ("last", "cos", "sin")]
    symbol = "edge_kv_attention_packed" if packed else "edge_kv_attention"
    y = emit.call(
        symbol,
        [*rows, *caches, *tables, numbers, given["scale"], given["softcap"]],
        [(batch, steps, given["heads"] * width)],
        node,
    )
    # The caches are written in place: what comes out is what went in.
    return emit.together(y, *caches)


def _rms_norm(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    x = emit.float32(given["x"])
    weight = emit.float32(given["weight"])
    return emit.like(emit.call("edge_rms_norm", [x, weight, given["eps"]], [emit.shape(x)], node), given["x"])


def _add_rms_norm(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    x, residual, weight = (emit.float32(given[name]) for name in ("x", "residual", "weight"))
    y, total = emit.call("edge_add_rms_norm", [x, residual, weight, given["eps"]], [emit.shape(x)] * 2, node)
    return emit.together(emit.like(y, given["x"]), emit.like(total, given["x"]))


def _swiglu(emit: Emitter, node: fx.Node) -> Any:
    joined = emit.float32(node.args[0])
    *rows, width = emit.shape(joined)
    return emit.like(emit.call("edge_swiglu", [joined], [(*rows, width // 2)], node), node.args[0])


def _codebook_lookup(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    codes = emit.integer(given["codes"])
    batch, _, *grid = emit.shape(codes)
    shape = (batch, given["tables"].meta["val"].shape[1], *grid)
    return emit.call("edge_codebook_lookup", [codes, emit.value(given["tables"]), given["size"]], [shape], node)


def _activation(emit: Emitter, node: fx.Node) -> Any:
    kind = tvm_fusion.ACTIVATIONS[node.target]
    if (plan := tvm_fusion.ending_in(node)) is not None:
        return _convolve(emit, plan, node)
    source = tvm_fusion.plain(node.args[0])
    if source.target is ATEN.group_norm.default:
        return _group_norm(emit, source, kind, node)
    x = emit.float32(node.args[0])
    return emit.like(emit.call("edge_activate", [x, int(kind)], [emit.shape(x)], node), node.args[0])


def _group_norm(emit: Emitter, norm: fx.Node, kind: Activation = Activation.NONE, node: fx.Node | None = None) -> Any:
    given = arguments(norm)
    if given["weight"] is None or given["bias"] is None:
        return emit.default(norm)
    values = [emit.value(given[name]) for name in ("input", "weight", "bias")]
    numbers = (given["eps"], given["num_groups"], int(kind))
    return emit.call("edge_group_norm", [*values, *numbers], [emit.shape(values[0])], node or norm)


def _identity_or_default(emit: Emitter, node: fx.Node) -> Any:
    source = tvm_fusion.same(node)
    return emit.default(node) if source is None else emit.value(source)


def _select(emit: Emitter, node: fx.Node) -> Any:
    """TVM's own form reads in front of the tensor where the index counts from the end."""
    given = arguments(node)
    x, axis = emit.value(given["self"]), given["dim"]
    size = given["self"].meta["val"].shape[axis]
    if not isinstance(size, int):
        return emit.default(node)
    return emit.row(x, axis, given["index"] % size)


def _max(emit: Emitter, node: fx.Node) -> Any:
    """TVM's own form sorts, by a library that the plain runtime does not have."""
    given = arguments(node)
    return emit.largest(emit.value(given["self"]), given["dim"], given["keepdim"])


def _extreme(emit: Emitter, node: fx.Node) -> Any:
    return emit.extreme(node)


def _embedding(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    return emit.rows(emit.value(given["weight"]), emit.value(given["indices"]))


def _cdist(emit: Emitter, node: fx.Node) -> Any:
    given = arguments(node)
    if given["p"] != 2:
        raise ExportError(
            f"node {node.name}: aten.cdist of p = {given['p']}, only 2 is known",
            where=f"{emit.program.entry} for tvm",
            way_out="Choose another backend with --backends.",
        )
    return emit.distances(emit.value(given["x1"]), emit.value(given["x2"]))


def _argmin(emit: Emitter, node: fx.Node) -> Any:
    """One kernel for the nearest row of a constant table; its distances are then not computed for themselves."""
    given = arguments(node)
    distances = given["self"]
    near = distances.target is ATEN.cdist.default and given["dim"] in (1, -1) and not given["keepdim"]
    if not (near and len(distances.users) == 1 and distances.meta["val"].dim() == 2):
        return emit.default(node)
    rows, codes, p = (arguments(distances)[name] for name in ("x1", "x2", "p"))
    if p != 2 or not emit.is_constant(codes):
        return emit.default(node)
    count, channels = codes.meta["val"].shape
    x = emit.float32(rows)
    table = emit.weight(codes, "panels", "float32", (-(-count // PANEL), channels, PANEL), cpu_layout.pack_linear)
    return emit.call("edge_nearest_code", [x, table, count], [emit.shape(x)[:1]], node, dtype="int64")


def _add(emit: Emitter, node: fx.Node) -> Any:
    plan = tvm_fusion.ending_in(node)
    return emit.default(node) if plan is None else _convolve(emit, plan, node)


def _conv(emit: Emitter, node: fx.Node) -> Any:
    plan = tvm_fusion.ending_in(node)
    return emit.default(node) if plan is None else _convolve(emit, plan, node)


def _convolve(emit: Emitter, plan: ConvPlan, node: fx.Node) -> Any:
    """One call for a convolution and all that it takes along; ``node`` is the last of them."""
    given, reading = arguments(plan.conv), plan.reading
    x = emit.value(reading.source)
    out, inside, *kernel = given["weight"].meta["val"].shape
    groups = given["groups"]
    if plan.transposed:  # [I, O/groups, ...]
        out, inside = inside * groups, out // groups
    panels = -(-(out // groups) // CHANNEL_PANEL)
    pack = cpu_layout.pack_conv_transpose if plan.transposed else cpu_layout.pack_conv
    shape = (groups, panels, inside, torch.Size(kernel).numel(), CHANNEL_PANEL)
    weight = emit.weight(given["weight"], "channels", "float32", shape, partial(pack, groups=groups))
    scale, shift = _factors(emit, reading)
    bias = emit.value(given["bias"])
    residual = emit.value(plan.residual)
    numbers = emit.numbers(*plan.numbers(), int(reading.activation), int(plan.activation))
    shape = plan.output_shape(emit.shape(x), out)
    symbol = "edge_conv_transpose" if plan.transposed else "edge_conv"
    return emit.call(symbol, [x, weight, scale, shift, bias, residual, numbers], [shape], node)


def _factors(emit: Emitter, reading: tvm_fusion.Reading) -> tuple[Any, Any]:
    """scale and shift of what the convolution does to its input, either may be None."""
    if reading.norm is None:
        if reading.scale is None:
            return emit.value(None), emit.value(None)
        return emit.weight(reading.scale, "flat", "float32", (-1,), lambda values: values.reshape(-1)), emit.value(None)
    given = arguments(reading.norm)
    values = [emit.value(given[name]) for name in ("input", "weight", "bias")]
    factors = emit.shape(values[0])[:2]
    return emit.once(
        reading.norm,
        lambda: emit.call(
            "edge_group_norm_factors",
            [*values, given["eps"], given["num_groups"]],
            [factors] * 2,
            reading.norm,
            " factors",
        ),
    )


def lowerings() -> dict[torch._ops.OpOverload, Lowering]:
    """Operator -> its lowering to a C++ kernel. An op that is missing decomposes to its reference."""
    table: dict[torch._ops.OpOverload, Lowering] = {
        ops.quantized_linear.overload: _quantized_linear,
        ops.quantized_embedding.overload: _quantized_embedding,
        ops.table_linear.overload: tvm_tables.table_linear,
        ops.table_embedding.overload: tvm_tables.table_embedding,
        ops.kv_attention.overload: _kv_attention,
        ops.rms_norm.overload: _rms_norm,
        ops.add_rms_norm.overload: _add_rms_norm,
        ops.swiglu.overload: _swiglu,
        ops.codebook_lookup.overload: _codebook_lookup,
        ATEN.linear.default: _linear,
        ATEN.group_norm.default: _group_norm,
        ATEN.add.Tensor: _add,
        ATEN.max.dim: _max,
        ATEN.amax.default: _extreme,
        ATEN.amin.default: _extreme,
        ATEN.embedding.default: _embedding,
        ATEN.cdist.default: _cdist,
        ATEN.argmin.default: _argmin,
        ATEN.select.int: _select,
        ATEN.div.Tensor: _identity_or_default,
        ATEN.clone.default: _identity_or_default,
    }
    table |= dict.fromkeys(tvm_fusion.ACTIVATIONS, _activation)
    table |= dict.fromkeys(tvm_fusion.CONVOLUTIONS, _conv)
    return table
