"""Removes calls that give their argument back, so that other passes see through them.

Given:  q, rest = alias(x), x[..., D:D];  y = cat([f(q), rest])  with x of D columns
Result: y = f(x)

Families whose RoPE turns a part of each head write this when the part is the whole.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from exporters.passes.graph import ATEN, calls, replace, same_shape, shape_of


def drop_identities(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for node in calls(graph, ATEN.alias.default, ATEN.slice.Tensor):
        if same_shape(node, node.args[0]) and node.args[4:] in ((), (1,)):  # a slice with a step of 1
            replace(node, node.args[0])
    for node in calls(graph, ATEN.cat.default):
        parts = [part for part in node.args[0] if not _is_empty(part)]
        if len(parts) == 1:
            replace(node, parts[0])


def _is_empty(node: Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape_of(node))
