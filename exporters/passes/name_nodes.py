"""Names each node by the checkpoint's module that it belongs to, for a compiler that reports by nodes' names.

Given:  MatMul "node_MatMul_170" from the module model.layers.0.mlp.down_proj
Result: MatMul "model.layers.0.mlp.down_proj/MatMul", numbered where a module has several
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from exporters.passes.context import Context
from exporters.passes.mark_origins import MODULE


def name_nodes(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        name = f"{node.metadata_props.get(MODULE, context.program.entry)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
