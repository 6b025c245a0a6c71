"""Writes codes transposed where their product reads them so.

Given:  MatMul(x, Transpose(DequantizeLinear(codes [N, K], scales [N, nb], zeros [N, nb]) {axis: 1}))
Result: MatMul(x, DequantizeLinear(codes' [K, N], scales' [nb, N], zeros' [nb, N]) {axis: 0})

That is the form which runtimes know: ONNX Runtime makes one product with the codes of it, and otherwise computes the
whole matrix in floats for every token. With 0.5B and two cores a token takes 0.05 s, near the 0.04 s of the contrib
operators, and not seconds; the process takes 1.4 GB and not 4.2 GB. Its sessions need the entry
session.qdq_matmulnbits_accuracy_level = 1, as runtimes/onnxruntime_.py sets it: by default it rounds x to int8.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context
from exporters.passes.initializers import shared_initializer
from exporters.passes.transpose_weights import transpose, transposed

#: What the name of the transposed copy ends in, where something else reads the values as they were.
TURNED = ".turned"


def turn_codes(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; codes that anything else reads, or whose columns are cut first, stay as they are."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or len(node.inputs[0].uses()) > 1:
            continue
        users = node.outputs[0].consumers()
        if [user.op_type for user in users] != ["Transpose"]:
            continue
        [user] = users
        for place, value in enumerate(node.inputs):
            node.replace_input_with(place, _turned(model, value))
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        node.outputs[0].shape = user.outputs[0].shape
        user.outputs[0].replace_all_uses_with(node.outputs[0])
        model.graph.remove(user, safe=True)


def _turned(model: ir.Model, value: ir.Value) -> ir.Value:
    if len(value.uses()) == 1:
        transpose(value, (1, 0))
        return value
    return shared_initializer(model, transposed(value.const_value, (1, 0), f"{value.name}{TURNED}"))
