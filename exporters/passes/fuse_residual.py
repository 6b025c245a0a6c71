"""Joins a residual sum with the norm that follows it.

Given:  total = x + residual;  y = rms_norm(total, w, eps);  ... total is used further on
Result: y, total = add_rms_norm(x, residual, w, eps)
"""

from __future__ import annotations

import operator

from torch.fx import Graph

from exporters import ops
from exporters.passes.graph import ATEN, calls, insert, is_call, replace, same_shape


def fuse_residual(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for norm in calls(graph, ops.rms_norm.overload):
        total, weight, eps = norm.args
        if not is_call(total, ATEN.add.Tensor) or total.kwargs or not same_shape(*total.args):
            continue
        if weight.op != "placeholder":  # made between the sum and the norm, as the ones of a norm without a weight
            continue
        value = norm.meta["val"]
        # At the place of the sum: its other users may come before the norm.
        fused = insert(total, ops.add_rms_norm.overload, (*total.args, weight, eps), (value, total.meta["val"]))
        outputs = [insert(total, operator.getitem, (fused, i), v) for i, v in enumerate(fused.meta["val"])]
        fused.meta.update({k: v for k, v in norm.meta.items() if k == "nn_module_stack"})
        replace(norm, outputs[0])
        replace(total, outputs[1])
