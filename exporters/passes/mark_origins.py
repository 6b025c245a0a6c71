"""Replaces the exporter's metadata by the Program's own names.

Given:  a node with pkg.torch.onnx.* metadata: file names, line numbers and the whole text of the traced node
Result: the node with edge.node (the Program's node) and edge.module (the module of the checkpoint)
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from exporters.passes.context import Context

NODE, MODULE = "edge.node", "edge.module"
_FX_NAME = re.compile(r"%(\w+) ")


def mark_origins(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place. Nothing of the build machine, such as a path, stays in the file."""
    for node in model.graph.all_nodes():
        match = _FX_NAME.match(node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        if match and match[1] in context.origins:
            node.metadata_props[NODE] = context.origins[match[1]]
        if len(scopes) > 1 and scopes[-2]:
            node.metadata_props[MODULE] = scopes[-2]
        node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name, model.doc_string, model.graph.doc_string = context.program.entry, None, None
    model.producer_name, model.producer_version = "edge-export", None


def _values(model: ir.Model):
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs
