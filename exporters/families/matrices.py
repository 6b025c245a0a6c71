"""The matrices of a language model as modules of fake tensors, and how each of their tensors is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exporters.blocks import PARTS, BlockLayout
from exporters.families import modules
from exporters.program import Constant, Inherited

if TYPE_CHECKING:
    from exporters.student import Student


class Matrices:
    """Makes fused linear layers and embeddings over a student's weights, recording how each tensor is loaded.

    Attributes:
        constants: name in the graph's state -> how to load it.
        inherited: prefix of a quantised matrix -> the student's tensors in it.
    """

    def __init__(self, student: Student, fake: FakeTensorMode):
        self.student, self.fake = student, fake
        self.constants: dict[str, Constant] = {}
        self.inherited: dict[str, Inherited] = {}

    def new(self, factory: Callable, *args, **kwargs):
        """Calls ``factory`` so that the tensors it makes take no memory."""
        with self.fake:
            return factory(*args, **kwargs)

    def linear(self, path: str, sources: list[str], bias: bool) -> modules.FusedLinear:
        matrix = self._matrix(f"{path}.matrix", sources)
        parameter = None
        if bias:
            loads = [self.float(f"{source}.bias") for source in sources]
            rows = sum(c.shape[0] for c in loads)
            parameter = self.new(lambda: nn.Parameter(torch.empty(rows), requires_grad=False))
            self.constants[f"{path}.bias"] = _concatenated(loads)
        return modules.FusedLinear(matrix, parameter, self.student.activations.get(sources[0]))

    def linear_of(self, path: str, weight: Constant) -> modules.FusedLinear:
        """A linear layer over a float matrix that is made of several tensors."""
        self.constants[f"{path}.matrix.weight"] = weight
        return modules.FusedLinear(self.new(modules.FloatWeight, *weight.shape), None)

    def embedding(self, path: str, scale: float | None = None) -> modules.FusedEmbedding:
        matrix = self._matrix(f"{path}.matrix", [path])
        return modules.FusedEmbedding(matrix) if scale is None else modules.ScaledEmbedding(matrix, scale)

    def _matrix(self, path: str, sources: list[str]) -> nn.Module:
        if sources[0] not in self.student.quantized:
            loads = [self.float(f"{source}.weight") for source in sources]
            whole = _concatenated(loads)
            self.constants[f"{path}.weight"] = whole
            return self.new(modules.FloatWeight, *whole.shape)
        tensors = [self.student.quantized[source] for source in sources]
        layout = BlockLayout.of(tensors[0], sources[0])
        rows, columns = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        matrix = self.new(modules.QuantizedWeight, rows, columns, layout)
        for name, buffer in matrix.named_buffers():
            parts = [
                Constant(_dtype(buffer), (t.shape[0], *buffer.shape[1:]), partial(self._part, name, source))
                for t, source in zip(tensors, sources, strict=True)
            ]
            self.constants[f"{path}.{name}"] = _concatenated(parts)
        self.inherited[path] = Inherited(
            tuple(sources), tuple(t.shape[0] for t in tensors), columns, layout.bits, layout.block, layout.encoding
        )
        return matrix

    def _part(self, name: str, source: str) -> np.ndarray:
        return PARTS[name](self.student.quantized[source])

    def float(self, name: str) -> Constant:
        shape = tuple(self.student.tensors[name].shape)
        return Constant("float32", shape, lambda: self.student.tensor(name).float().numpy())

    def joinable(self, sources: list[str]) -> bool:
        """Exact only where all parts are float, or share bits, block and the presence of zero points; and the rounding
        of their input."""
        if len({self.student.activations.get(source) for source in sources}) > 1:
            return False
        quantized = [self.student.quantized.get(source) for source in sources]
        if all(tensor is None for tensor in quantized):
            return True
        if any(tensor is None for tensor in quantized):
            return False
        return len({BlockLayout.of(tensor, sources[0]) for tensor in quantized}) == 1


def _concatenated(parts: list[Constant]) -> Constant:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return Constant(parts[0].dtype, shape, lambda: np.concatenate([p.load() for p in parts]))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
