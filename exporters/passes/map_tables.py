"""Leaves a float table where its file is mapped.

Given:  MatMul(x [1, K], W) or FusedMatMul(x, W)   with an initializer W that one row is multiplied with, or that a
                                                   Gather reads as well
Result: W among the graph's inputs

An initializer that is an input, as its default value, is no constant to ONNX Runtime: it is not packed anew but read
from the mapped file. For a table of [151936, 896] that is 563 MB of resident memory and 0.01 s of loading in the place
of 1,107 MB and 0.48 s. Several rows are multiplied faster with a packed copy, which is made where no table is shared.
One row is by up to 6 % on Intel and is slower on AMD, so that a profile can leave this pass out (`float_tables`).
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context

_PRODUCTS = ("MatMul", "FusedMatMul")


def map_tables(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses()]
        rows = [node.inputs[0].shape for node in readers if node.op_type in _PRODUCTS and node.inputs[1] is weight]
        looked_up = any(node.op_type == "Gather" for node in readers)
        if rows and (looked_up or all(set(shape[:-1]) == {1} for shape in rows)) and weight not in model.graph.inputs:
            model.graph.inputs.append(weight)
