"""Builds nodes in front of another one, each with the type and shape of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.passes.initializers import shared_initializer


class Editor:
    """Inserts nodes before ``node`` and finally puts a value in its place; they inherit its origin."""

    def __init__(self, model: ir.Model, node: ir.Node):
        self._model, self._node = model, node

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        dtype: ir.DataType,
        shape: Any,
        domain: str = "",
    ) -> ir.Value:
        """The one output of a new node."""
        origin = dict(self._node.metadata_props)
        made = ir.node(op_type, list(inputs), dict(attributes), domain=domain, metadata_props=origin)
        made.outputs[0].dtype, made.outputs[0].shape = dtype, ir.Shape(list(shape))
        self._model.graph.insert_before(self._node, made)
        return made.outputs[0]

    def constant(self, values: np.ndarray) -> ir.Value:
        """A small initializer, shared by all who ask for the same values."""
        flat = "_".join(str(value).replace("-", "m").replace(".", "p") for value in values.ravel().tolist())
        name = f"constant_{values.dtype}_{'x'.join(map(str, values.shape))}_{flat}"
        return shared_initializer(self._model, ir.Tensor(values, name=name))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``; itself where it has it."""
        if value.dtype == dtype:
            return value
        return self("Cast", [value], {"to": int(dtype)}, dtype, value.shape or ())

    def reshape(self, value: ir.Value, shape: Sequence[Any], target: Sequence[int] | None = None) -> ir.Value:
        """``value`` in ``shape``; ``target`` is what ONNX is told of symbolic sizes (0 keeps one)."""
        wanted = self.constant(np.array(shape if target is None else target, np.int64))
        return self("Reshape", [value, wanted], {}, value.dtype, shape)

    def padded(self, x: ir.Value, columns: int) -> ir.Value:
        """``x`` with that many zero columns behind its last axis."""
        rank = len(x.shape)
        pads = self.constant(np.array([0] * (2 * rank - 1) + [columns], np.int64))
        return self("Pad", [x, pads], {}, x.dtype, [*x.shape[:-1], x.shape[-1] + columns])

    def block_sums(self, x: ir.Value, blocks: int) -> ir.Value:
        """Sums of the last axis of ``x`` [..., K] over its equal blocks: [..., blocks]."""
        lead = list(x.shape[:-1])
        cut = self.reshape(x, [*lead, blocks, x.shape[-1] // blocks], [0] * len(lead) + [blocks, x.shape[-1] // blocks])
        axes = self.constant(np.array([-1], np.int64))
        return self("ReduceSum", [cut, axes], {"keepdims": 0}, x.dtype, [*lead, blocks])

    def replace(self, value: ir.Value) -> None:
        """Gives ``value`` to everything that read the node, and removes the node."""
        old = self._node.outputs[0]
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        value.name, old.name = old.name, None
        self._model.graph.remove(self._node, safe=True)
