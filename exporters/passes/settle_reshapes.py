"""Gives a Reshape a constant target where at most one dimension is free.

Given:  Reshape(x, Concat(Shape(x)[0], 8, 128))  whose result is [B, 8, 128]
Result: Reshape(x, [-1, 8, 128])                 and the nodes that computed the target are gone
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.passes.context import Context
from exporters.passes.initializers import shared_initializer


def settle_reshapes(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        shape = node.outputs[0].shape
        if shape is None or sum(not isinstance(size, int) for size in shape) > 1:
            continue
        # A size of 0 would mean "as the input has it", so an empty tensor keeps its computed target.
        target = [size if isinstance(size, int) else -1 for size in shape]
        if 0 not in target:
            node.replace_input_with(1, _constant(model, target))
    RemoveUnusedNodesPass()(model)


def _constant(model: ir.Model, target: list[int]) -> ir.Value:
    """The initializer of that target, shared by all reshapes to it."""
    name = "shape_" + "_".join(str(size).replace("-1", "free") for size in target)
    return shared_initializer(model, ir.Tensor(np.array(target, np.int64), name=name))
