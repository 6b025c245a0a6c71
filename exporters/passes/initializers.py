"""What the model passes share: adding an initializer."""

from __future__ import annotations

import onnx_ir as ir


def add_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers ``tensor``, which may be lazy, under its own name; returns the value that nodes can read."""
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
