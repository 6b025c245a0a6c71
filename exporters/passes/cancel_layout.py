"""Removes transposes and reshapes that undo each other.

Given:  y = reshape(transpose(transpose(view(x, [B, S, H, D]), 1, 2), 1, 2), [B, S, H*D])
Result: y = x
"""

from __future__ import annotations

from torch.fx import Graph, Node

from exporters.passes.graph import ATEN, calls, is_call, replace, same_shape

_RESHAPES = (ATEN.view.default, ATEN.reshape.default, ATEN.flatten.using_ints, ATEN._unsafe_view.default)
_COPIES = (ATEN.clone.default, ATEN.contiguous.default)


def cancel_layout(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for copy in calls(graph, *_COPIES):  # layout in memory is the backend's business
        replace(copy, copy.args[0])
    for node in calls(graph, ATEN.transpose.int):
        inner = node.args[0]
        if is_call(inner, ATEN.transpose.int) and _axes(inner) == _axes(node):
            replace(node, inner.args[0])
    for node in calls(graph, *_RESHAPES):
        source = node.args[0]
        while is_call(source, *_RESHAPES):
            source = source.args[0]
        if same_shape(source, node):
            replace(node, source)


def _axes(node: Node) -> frozenset[int]:
    rank = len(node.meta["val"].shape)
    return frozenset(axis % rank for axis in node.args[1:])
