"""Lets MatMulNBits quantise its activations to int8, block by block.

Given:  MatMulNBits {accuracy_level: 1}   (float32)
Result: MatMulNBits {accuracy_level: 4}   (int8 x int4/int8 with int32 sums)
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.context import Context

INT8_ACTIVATIONS = 4


def set_fast_accuracy(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", INT8_ACTIVATIONS)
