"""Turns the product that makes the logits into the kernel that also picks the largest of a range of rows.

Given:  logits = Cast(row(EdgeNormLinear(x, norm, head, bias)))  as an output of the graph
Result: logits, values, ids = EdgeHead(x, norm, head, rows);  top_values, top_ids = EdgeMergeTop(values, ids)
        with the further input `rows` and the further outputs `top_values` and `top_ids`

A modality's tokens are one range of rows, so a step of generation reads those rows' weights alone, and what leaves the
device is K candidates instead of a vocabulary of logits.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.ops.tensorrt import EDGE, PLUGIN
from exporters.passes.context import Context

ROWS, VALUES, IDS = "rows", "top_values", "top_ids"
#: Rows of a tile, of which each gives its candidates; candidates in all.
TILE, CANDIDATES = 256, 64


def attach_head(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place, where the logits come straight out of a product; a scaled or capped head stays."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    product = None if logits is None else _product(logits)
    if product is None:
        return
    x, norm, codes, scales, zeros = (*product.inputs, None)[:5]
    vocabulary = codes.shape[0]
    tiles = -(-vocabulary // TILE)
    rows = ir.Value(name=ROWS, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.append(rows)
    attributes = {name: product.attributes[name] for name in ("bits", "block", "eps")}
    head = ir.node(
        "EdgeHead",
        [x, norm, codes, scales, zeros, rows],
        {"k": CANDIDATES, **PLUGIN},
        domain=EDGE,
        num_outputs=3,
        metadata_props=dict(product.metadata_props),
    )
    head.attributes.update(attributes)
    merge = ir.node("EdgeMergeTop", head.outputs[1:], {"k": CANDIDATES, **PLUGIN}, domain=EDGE, num_outputs=2)
    batch = x.shape[0]
    _type(head.outputs, [(batch, vocabulary), (batch, tiles, CANDIDATES), (batch, tiles, CANDIDATES)])
    _type(merge.outputs, [(batch, CANDIDATES)] * 2)
    model.graph.insert_after(product, [head, merge])
    for value, name in zip(merge.outputs, (VALUES, IDS), strict=True):
        value.name = name
        model.graph.outputs.append(value)
    logits.replace_all_uses_with(head.outputs[0], replace_graph_outputs=True)
    last = logits.producer()
    head.outputs[0].name, logits.name = logits.name, None
    while last is not None and not any(output.uses() or output.is_graph_output() for output in last.outputs):
        before = last.inputs[0].producer()
        model.graph.remove(last, safe=True)
        last = before if before is not head else None


def _product(logits: ir.Value) -> ir.Node | None:
    """The product that the logits are a row of, behind nothing but casts and selections."""
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Gather", "Squeeze", "Reshape", "Slice"):
        node = node.inputs[0].producer()
    if node is None or node.domain != EDGE or node.op_type != "EdgeNormLinear" or any(node.inputs[5:]):
        return None  # with a bias it is another product
    shape = node.inputs[0].shape
    return node if shape is not None and len(shape) == 3 and shape[1] == 1 else None


def _type(values, shapes) -> None:
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT32)[-len(shapes) :]
    for value, shape, kind in zip(values, shapes, kinds, strict=True):
        value.dtype, value.shape = kind, ir.Shape(list(shape))
