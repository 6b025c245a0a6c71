"""Joins the two halves of a gated MLP.

Given:  silu(y[..., :I]) * y[..., I:]
Result: swiglu(y)
"""

from __future__ import annotations

from torch.fx import Graph

from exporters import ops
from exporters.passes.graph import ATEN, calls, insert, is_call, last_axis_slice, replace, shape_of


def fuse_swiglu(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for product in calls(graph, ATEN.mul.Tensor):
        activated, up = product.args
        if not is_call(activated, ATEN.silu.default):
            continue
        halves = [last_axis_slice(activated.args[0]), last_axis_slice(up)]
        if None in halves or halves[0][0] is not halves[1][0]:
            continue
        joined = halves[0][0]
        half = shape_of(joined)[-1] // 2
        if [h[1:] for h in halves] == [(0, half), (half, 2 * half)]:
            replace(product, insert(product, ops.swiglu.overload, (joined,), product.meta["val"]))
