"""Multiplies with float matrices by the operator that ONNX Runtime runs fastest.

Given:  Gemm(x, W, b or none) {transB: 1}        with the initializer W [N, K]
Result: FusedMatMul(x, W) {transB: 1}, Add(b)

With one row of x and W [151936, 896] Gemm takes 40 ms and FusedMatMul 17 ms (ONNX Runtime 1.31, two cores).
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context
from exporters.passes.editor import Editor
from exporters.passes.transpose_tables import is_product

_CONTRIB = "com.microsoft"


def spell_gemms(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for weight in list(model.graph.initializers.values()):
        for node in [use.node for use in weight.uses()]:
            if is_product(node, weight):
                _spell(Editor(model, node), *node.inputs)
                model.graph.opset_imports.setdefault(_CONTRIB, 1)


def _spell(add: Editor, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> None:
    shape = [x.shape[0], weight.shape[0]]
    result = add("FusedMatMul", [x, weight], {"transB": 1}, x.dtype, shape, _CONTRIB)
    add.replace(result if bias is None else add("Add", [result, bias], {}, x.dtype, shape))
