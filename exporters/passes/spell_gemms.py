"""Multiplies with float matrices by the operator that ONNX Runtime runs fastest, and a tied table where it lies.

Given:  Gemm(x, W, b or none) {transB: 1}        with the initializer W [N, K]
Result: FusedMatMul(x, W) {transB: 1}, Add(b)    and W among the graph's inputs if a Gather reads it as well

With one row of x and W [151936, 896] Gemm takes 40 ms and FusedMatMul 17 ms (ONNX Runtime 1.31, two cores).

An initializer that is an input, as its default value, is no constant to ONNX Runtime: the matrix is not packed anew
but read where the file is mapped. For that table it is 563 MB of resident memory and 0.01 s of loading in the place of
1,107 MB and 0.48 s, and 18 ms instead of 17 ms a token.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context

_CONTRIB = "com.microsoft"


def spell_gemms(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in list(model.graph):
        if node.op_type == "Gemm" and _is_product(node):
            _replace(model.graph, node)
            model.graph.opset_imports.setdefault(_CONTRIB, 1)


def _is_product(node: ir.Node) -> bool:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    return (
        node.inputs[1].is_initializer()
        and attributes.get("transB", 0) == 1
        and attributes.get("transA", 0) == 0
        and not scaled
    )


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias = (*node.inputs, None)[:3]
    [result] = node.outputs
    attributes = [ir.AttrInt64("transB", 1)]
    nodes = [ir.Node(_CONTRIB, "FusedMatMul", [x, weight], attributes, name=node.name, version=1)]
    if bias is not None:
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{node.name}.bias"))
        nodes[0].outputs[0].name = f"{result.name}.product"
        nodes[0].outputs[0].type, nodes[0].outputs[0].shape = result.type, result.shape
    for each in nodes:
        each.metadata_props.update(node.metadata_props)
    output = nodes[-1].outputs[0]
    output.name, output.type, output.shape = result.name, result.type, result.shape
    graph.insert_before(node, nodes)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if weight not in graph.inputs and any(use.node.op_type == "Gather" for use in weight.uses()):
        graph.inputs.append(weight)
