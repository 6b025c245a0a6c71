"""Writes indexing by tensors as the slice or the lookup that it is, for which every backend has an operator.

Given:  x[..., [i], ...] with a number that the code holds in a tensor       Result: x[..., i:i+1, ...]
Given:  table[ids] with a weight or buffer [N, D] and whole numbers          Result: embedding(table, ids)

Falcon takes its one key and value head by the first, GPT-J and CodeGen look their sines up by the second.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from exporters.passes.graph import ATEN, calls, insert, is_call, replace, shape_of


def spell_indexing(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for node in calls(graph, ATEN.index.Tensor):
        source, indices = node.args
        if sum(index is not None for index in indices) != 1:
            continue
        axis, index = next((axis, index) for axis, index in enumerate(indices) if index is not None)
        size, number = shape_of(source)[axis], _number(index)
        if number is not None and isinstance(size, int):
            start = number % size
            replace(node, insert(node, ATEN.slice.Tensor, (source, axis, start, start + 1), node.meta["val"]))
        elif source.op == "placeholder" and axis == 0 and len(shape_of(source)) == 2 and _is_whole(index):
            replace(node, insert(node, ATEN.embedding.default, (source, index), node.meta["val"]))


def _number(index: Node) -> int | None:
    """The one number in a tensor [1] that the code made."""
    while is_call(index, ATEN.lift_fresh_copy.default):
        index = index.args[0]
    held = getattr(index.meta["val"], "constant", None) if index.op == "placeholder" else None
    return int(held) if held is not None and held.shape == (1,) and _is_whole(index) else None


def _is_whole(index: Node) -> bool:
    dtype = index.meta["val"].dtype
    return not (dtype.is_floating_point or dtype.is_complex or str(dtype) == "torch.bool")
