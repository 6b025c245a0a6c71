"""Moves the rotary embedding of query and key into the attention op.

Given:  cos, sin = rope_angles(C, S, positions)
        q' = q * cos + cat(-q[..., D/2:], q[..., :D/2]) * sin      (likewise k')
        kv_attention(rows(q'), rows(k'), v, ..., cos=None, sin=None)
Result: kv_attention(rows(q), rows(k), v, ..., cos=C, sin=S)

Only where both are rotated with one table at the positions of the new tokens, which is what the op does inside.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from exporters import ops
from exporters.passes.graph import ATEN, calls, is_call, replace, shape_of

_LAYOUT = (
    ATEN.transpose.int,
    ATEN.view.default,
    ATEN.reshape.default,
    ATEN.flatten.using_ints,
    ATEN.clone.default,
    ATEN.contiguous.default,
    ATEN.unsqueeze.default,
)


def fold_rope(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for attention in calls(graph, ops.kv_attention.overload):
        rotations = [_rotation(_source(attention.args[i])) for i in (0, 1)]
        if None in rotations or rotations[0][1] is not rotations[1][1] or attention.args[6] is not None:
            continue
        angles = rotations[0][1]
        if not _is_newest(angles.args[2], attention.args[5]):
            continue
        for node, _, before in rotations:
            replace(node, before)
        cos, sin, _ = angles.args
        attention.args = (*attention.args[:6], cos, sin, *attention.args[8:])


def _source(node: Node) -> Node:
    """The node that layout changes start from."""
    while is_call(node, *_LAYOUT):
        node = node.args[0]
    return node


def _rotation(node: Node) -> tuple[Node, Node, Node] | None:
    """(the sum, the rope_angles call, the tensor before rotation) if ``node`` is a rotation."""
    if not is_call(node, ATEN.add.Tensor) or len(node.args) != 2:
        return None
    straight, turned = node.args
    if not (is_call(straight, ATEN.mul.Tensor) and is_call(turned, ATEN.mul.Tensor)):
        return None
    x, cos = straight.args
    half_turned, sin = turned.args
    angles = _angles(cos, 0)
    if angles is None or angles is not _angles(sin, 1) or not _is_rotate_half(half_turned, x):
        return None
    return node, angles, x


def _is_newest(positions: Node, last: Node) -> bool:
    """Whether ``positions`` is last - (S - 1) + arange(S), the positions at which the op itself rotates."""
    added = _source(positions)
    if not is_call(added, ATEN.add.Tensor) or added.kwargs:
        return False
    first, steps = added.args
    if not (is_call(first, ATEN.sub.Tensor) and is_call(steps, ATEN.arange.default)) or first.kwargs:
        return False
    start, back = first.args
    return start is last and is_call(back, operator.sub) and back.args == (steps.args[0], 1)


def _angles(node: Node, index: int) -> Node | None:
    source = _source(node)
    if is_call(source, operator.getitem) and source.args[1] == index:
        call = source.args[0]
        return call if is_call(call, ops.rope_angles.overload) else None
    return None


def _is_rotate_half(node: Node, x: Node) -> bool:
    """Whether ``node`` is cat(-x[..., D/2:], x[..., :D/2])."""
    if not is_call(node, ATEN.cat.default) or len(node.args[0]) != 2:
        return False
    negated, first = node.args[0]
    half = shape_of(x)[-1] // 2
    if not is_call(negated, ATEN.neg.default):
        return False
    spans = [_span(t) for t in (negated.args[0], first)]
    return spans == [(x, half, 2 * half), (x, 0, half)]


def _span(node: Node) -> tuple | None:
    if not is_call(node, ATEN.slice.Tensor) or node.args[1] != 3:
        return None
    width = shape_of(node.args[0])[-1]
    return node.args[0], node.args[2] or 0, min(node.args[3], width)
