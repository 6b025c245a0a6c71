"""Gives each initializer that stands for a weight its lazily loaded values.

Given:  initializer "model.layers.0.mlp.down_proj.matrix.codes" without data (it was traced as a fake tensor)
Result: the same with a LazyTensor over the Program's constant of that name
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from exporters.external_data import ROWS, SOURCE
from exporters.passes.context import Context
from exporters.program import Constant


def attach_weights(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; an initializer that no constant names keeps its own values."""
    for name, value in model.graph.initializers.items():
        constant = context.program.constants.get(name)
        if constant is not None:
            value.const_value = ir.LazyTensor(
                partial(_load, constant, name), dtype=value.dtype, shape=value.shape, name=name
            )
            value.const_value.meta[SOURCE] = constant
            if constant.rows is not None:
                value.const_value.meta[ROWS] = constant.rows


def _load(constant: Constant, name: str) -> ir.Tensor:
    return ir.Tensor(constant.load(), name=name)
