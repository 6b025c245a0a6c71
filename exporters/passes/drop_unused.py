"""Drops initializers that no node reads any more, such as the packed codes of a product that was spelled out."""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context


def drop_unused(model: ir.Model, context: Context | None = None) -> None:
    """Edits ``model`` in place."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
