"""Writes a weight transposed where that is all a Transpose does.

Given:  MatMul(x, Transpose(W))  with the initializer W [N, K] used nowhere else
Result: MatMul(x, W')            with W' [K, N]
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.passes.context import Context


def transpose_weights(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; the weight keeps its name and is loaded when it is written."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or not node.inputs[0].is_initializer() or len(node.inputs[0].uses()) > 1:
            continue
        weight, turned = node.inputs[0], node.outputs[0]
        order = node.attributes["perm"].as_ints()
        tensor = weight.const_value
        weight.shape = ir.Shape([tensor.shape[axis] for axis in order])
        weight.const_value = ir.LazyTensor(
            partial(_transposed, tensor, tuple(order)), dtype=tensor.dtype, shape=weight.shape, name=weight.name
        )
        turned.replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...]) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), name=tensor.name)
