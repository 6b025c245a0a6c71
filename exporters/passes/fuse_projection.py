"""Joins quantised products with the norm in front of them and with the SwiGLU or residual sum behind.

Given:  normed, total = add_rms_norm(x, quantized_linear(h, W), w);  y = swiglu(quantized_linear(normed, V))
Result: total = projection(h, W, residual=x);                        y = projection(total, V, norm=w, gated)
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from exporters import ops
from exporters.passes.graph import ATEN, calls, insert, is_call, replace, shape_of

_NORM, _RESIDUAL = 1, 6


def fuse_projection(graph: Graph) -> None:
    """Edits ``graph`` in place; every quantised product becomes a projection."""
    for product in calls(graph, ops.quantized_linear.overload):
        x, codes, scales, zeros, bias, bits, columns = product.args
        args = (x, None, codes, scales, zeros, bias, None, bits, columns, 0.0, False)
        replace(product, insert(product, ops.projection.overload, args, product.meta["val"]))
    for norm in calls(graph, ops.add_rms_norm.overload):
        _split_sum(norm)
    for norm in calls(graph, ops.rms_norm.overload):
        _take_norm(norm)
    for gate in calls(graph, ops.swiglu.overload):
        _take_gate(gate)


def _split_sum(node: Node) -> None:
    """add_rms_norm -> the sum, taken by a projection where one made a term of it, and the norm alone."""
    first, second, weight, eps = node.args
    for term, other in ((second, first), (first, second)):
        if is_call(term, ops.projection.overload) and len(term.users) == 1 and _plain(term):
            args = list(term.args)
            args[_RESIDUAL] = other
            # At the place of the norm: the other term may come behind the product.
            total = insert(node, ops.projection.overload, tuple(args), node.meta["val"][1])
            total.meta.update({key: term.meta[key] for key in ("nn_module_stack",) if key in term.meta})
            break
    else:
        total = insert(node, ATEN.add.Tensor, (first, second), node.meta["val"][1])
    normed = insert(node, ops.rms_norm.overload, (total, weight, eps), node.meta["val"][0])
    for user in list(node.users):
        assert user.target is operator.getitem
        replace(user, (normed, total)[user.args[1]])


def _plain(projection: Node) -> bool:
    return projection.args[_RESIDUAL] is None and not projection.args[-1]


def _take_norm(norm: Node) -> None:
    """A norm that only projections read moves into them; a slice of its rows in between moves in front of it."""
    x, weight, eps = norm.args
    for user in list(norm.users):
        if is_call(user, ATEN.slice.Tensor) and len(shape_of(norm)) - 1 not in user.args[1:2]:
            rows = insert(user, ATEN.slice.Tensor, (x, *user.args[1:]), user.meta["val"])
            replace(user, insert(user, ops.rms_norm.overload, (rows, weight, eps), user.meta["val"]))
    graph = norm.graph
    for each in (node for node in calls(graph, ops.rms_norm.overload) if node.args[1] is weight):
        readers = list(each.users)
        if not all(is_call(user, ops.projection.overload) and user.args[0] is each for user in readers):
            continue
        for user in readers:
            args = list(user.args)
            args[0], args[_NORM], args[-2] = each.args[0], weight, eps
            user.args = tuple(args)


def _take_gate(gate: Node) -> None:
    joined = gate.args[0]
    if is_call(joined, ops.projection.overload) and len(joined.users) == 1 and _plain(joined):
        args = (*joined.args[:-1], True)
        replace(gate, insert(gate, ops.projection.overload, args, gate.meta["val"]))
