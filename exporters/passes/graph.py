"""What the passes share: reading nodes of an exported graph by operator, never by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

ATEN = torch.ops.aten


def calls(graph: Graph, *targets) -> Iterator[Node]:
    """The nodes that call one of ``targets``, in order; the graph may be edited while iterating."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def is_call(node, *targets) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def shape_of(node: Node) -> torch.Size:
    """The node's (possibly symbolic) shape."""
    return node.meta["val"].shape


def same_shape(a, b) -> bool:
    """Whether two arguments are tensors that provably have one shape; a number is not."""
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return False
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(str(x) == str(y) for x, y in zip(left, right, strict=True))


def last_axis_slice(node) -> tuple[Node, int, int] | None:
    """(source, start, stop) if ``node`` is ``source[..., start:stop]``."""
    if not is_call(node, ATEN.slice.Tensor):
        return None
    source, axis, start, stop, *step = (*node.args, *(0, None, None)[len(node.args) - 1 :])
    width = shape_of(source)[-1]
    if axis not in (-1, len(shape_of(source)) - 1) or (step and step[0] not in (None, 1)):
        return None
    return source, start or 0, min(stop if stop is not None else width, width)


def replace(node: Node, by: Node) -> None:
    """Redirects every use of ``node``."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def place_of(node: Node) -> dict[str, object]:
    """Where in the module tree a node stands, which whatever replaces it carries on: its `meta` in part."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def insert(before: Node, target, args: tuple, value) -> Node:
    """A new call before ``before`` with the fake ``value`` it returns."""
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args)
    new.meta["val"] = value
    new.meta.update(place_of(before))
    return new
