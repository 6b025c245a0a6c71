"""Folds constants, drops unused nodes and merges equal ones, without reading a large weight."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer

from exporters.passes.context import Context

#: Elements above which a constant is neither read nor produced: weights stay on disk.
LARGEST_FOLDED = 1024


def simplify_model(model: ir.Model, context: Context) -> None:
    """Runs onnxscript's optimizer in place."""
    onnxscript.optimizer.optimize(model, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED)
