"""What the model passes share: initializers, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.encodings import values

#: What the name of an encoding's table ends in.
TABLE = ".table"


def shared_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of the name of ``tensor``, which may be lazy: the one that is there, or one made of it."""
    if tensor.name in model.graph.initializers:
        return model.graph.initializers[tensor.name]
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def lazy_initializer(
    model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable[[], np.ndarray]
) -> ir.Value:
    """The initializer ``name``, whose ``load`` runs when the model is written.

    Values of a 4-bit type come as one element a byte and are packed here.
    """
    tensor = ir.LazyTensor(partial(_loaded, load, dtype, name), dtype=dtype, shape=ir.Shape(shape), name=name)
    return shared_initializer(model, tensor)


def value_table(model: ir.Model, encoding: str) -> ir.Value:
    """float32 [2**bits]: what each code of an encoding stands for, once in a model."""
    table = values(encoding)
    return lazy_initializer(model, encoding + TABLE, ir.DataType.FLOAT, table.shape, lambda: table)


def _loaded(load: Callable[[], np.ndarray], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    values = np.ascontiguousarray(load())
    if dtype.bitwidth < 8:
        return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)
    return ir.Tensor(values, name=name)
