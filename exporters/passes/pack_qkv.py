"""Lets attention read the joined projection instead of three slices of it.

Given:  kv_attention(y[..., :a], y[..., a:b], y[..., b:], ...)  with y of b + (b - a) columns
Result: kv_attention(y, None, None, ...)
"""

from __future__ import annotations

from torch.fx import Graph

from exporters import ops
from exporters.passes.graph import calls, last_axis_slice, shape_of


def pack_qkv(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for attention in calls(graph, ops.kv_attention.overload):
        parts = [last_axis_slice(arg) for arg in attention.args[:3]]
        if None in parts:
            continue
        (source, start, a), (key_source, a2, b), (value_source, b2, end) = parts
        contiguous = (start, a2, b2, end) == (0, a, b, shape_of(source)[-1])
        if contiguous and source is key_source is value_source:
            attention.args = (source, None, None, *attention.args[3:])
