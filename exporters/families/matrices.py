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
from exporters.errors import QuantizationError
from exporters.families import modules
from exporters.families.unsupported import SUPPORTED, UnsupportedModule
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
        self._row_orders: dict[str, str] = {}
        self._folded: set[str] = set()

    def fold_order(self, behind: str, before: list[str]) -> None:
        """Moves the act-order of the columns of ``behind`` into the rows of the matrices ``before`` it.

        Exact where what stands between them treats every feature alike; call it before they are made.
        """
        tensor = self.student.quantized.get(behind)
        if tensor is not None and tensor.order is not None:
            self._row_orders.update(dict.fromkeys(before, behind))
            self._folded.add(behind)

    def _in_row_order(self, source: str, values: np.ndarray) -> np.ndarray:
        behind = self._row_orders.get(source)
        return values if behind is None else values[self.student.quantized[behind].order]

    def new(self, factory: Callable, *args, **kwargs):
        """Calls ``factory`` so that the tensors it makes take no memory."""
        with self.fake:
            return factory(*args, **kwargs)

    def linear(self, path: str, sources: list[str], bias: bool, paired: bool = False) -> modules.FusedLinear:
        """A linear layer over the matrices of ``sources``, stacked; ``paired``: see Inherited."""
        matrix = self._matrix(f"{path}.matrix", sources, paired)
        parameter = None
        if bias:
            loads = [self._rows(source, "bias") for source in sources]
            rows = sum(c.shape[0] for c in loads)
            parameter = self.new(lambda: nn.Parameter(torch.empty(rows), requires_grad=False))
            self.constants[f"{path}.bias"] = _concatenated(loads)
        return modules.FusedLinear(matrix, parameter, self.student.activations.get(sources[0]))

    def transposed_linear(self, path: str) -> modules.FusedLinear:
        """A linear layer whose weight is stored as [inputs, outputs] (Conv1D of the GPT-2 class), with a bias."""
        stored, bias = self.float(f"{path}.weight"), self.float(f"{path}.bias")
        weight = Constant(stored.dtype, stored.shape[::-1], lambda: np.ascontiguousarray(stored.load().T))
        layer = self.linear_of(path, weight)
        layer.bias = self.new(lambda: nn.Parameter(torch.empty(bias.shape), requires_grad=False))
        self.constants[f"{path}.bias"] = bias
        return layer

    def linear_of(self, path: str, weight: Constant) -> modules.FusedLinear:
        """A linear layer over a float matrix that is made of several tensors."""
        self.constants[f"{path}.matrix.weight"] = weight
        return modules.FusedLinear(self.new(modules.FloatWeight, *weight.shape), None)

    def embedding(self, path: str, scale: float | None = None) -> modules.FusedEmbedding:
        tensor = self.student.quantized.get(path)
        if tensor is not None and tensor.order is not None:
            raise QuantizationError(
                "a table that is looked up is in act-order",
                where=path,
                way_out="Quantise the embedding without actorder",
            )
        matrix = self._matrix(f"{path}.matrix", [path])
        return modules.FusedEmbedding(matrix) if scale is None else modules.ScaledEmbedding(matrix, scale)

    def _matrix(self, path: str, sources: list[str], paired: bool = False) -> nn.Module:
        if sources[0] not in self.student.quantized:
            loads = [self._rows(source, "weight") for source in sources]
            whole = _concatenated(loads)
            self.constants[f"{path}.weight"] = whole
            return self.new(modules.FloatWeight, *whole.shape)
        tensors = [self.student.quantized[source] for source in sources]
        layout = BlockLayout.of(tensors[0], sources[0])
        rows, columns = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        order = None if sources[0] in self._folded else tensors[0].order
        matrix = self.new(modules.QuantizedWeight, rows, columns, layout, order is not None)
        for name, buffer in matrix.named_buffers():
            if name == "order":
                self.constants[f"{path}.{name}"] = Constant.of(order)
                continue
            parts = [
                Constant(_dtype(buffer), (t.shape[0], *buffer.shape[1:]), partial(self._part, name, source))
                for t, source in zip(tensors, sources, strict=True)
            ]
            self.constants[f"{path}.{name}"] = _paired(parts) if paired else _concatenated(parts)
        self.inherited[path] = Inherited(
            tuple(sources),
            tuple(t.shape[0] for t in tensors),
            columns,
            layout.bits,
            layout.block,
            layout.encoding,
            self._row_orders.get(sources[0]),
            sources[0] in self._folded,
            paired,
        )
        return matrix

    def _part(self, name: str, source: str) -> np.ndarray:
        return self._in_row_order(source, PARTS[name](self.student.quantized[source]))

    def _rows(self, source: str, name: str) -> Constant:
        """A float tensor of a layer whose first axis is the layer's outputs."""
        stored = self.float(f"{source}.{name}")
        if source not in self._row_orders:
            return stored
        return Constant(stored.dtype, stored.shape, lambda: self._in_row_order(source, stored.load()))

    def float(self, name: str) -> Constant:
        if name not in self.student.tensors:
            raise UnsupportedModule("the checkpoint has no value under this name", where=name, way_out=SUPPORTED)
        shape = tuple(self.student.tensors[name].shape)

        def rows(which: slice = slice(None)) -> np.ndarray:
            return self.student.tensor(name)[which].float().numpy()

        return Constant("float32", shape, rows, rows)

    def joinable(self, sources: list[str]) -> bool:
        """Exact only where all parts are float, or share bits, block, act-order and the presence of zero points; and
        the rounding of their input."""
        if len({self.student.activations.get(source) for source in sources}) > 1:
            return False
        quantized = [self.student.quantized.get(source) for source in sources]
        if all(tensor is None for tensor in quantized):
            return True
        if any(tensor is None for tensor in quantized):
            return False
        orders = {None if tensor.order is None else tensor.order.tobytes() for tensor in quantized}
        return len({BlockLayout.of(tensor, sources[0]) for tensor in quantized}) == len(orders) == 1


def _concatenated(parts: list[Constant]) -> Constant:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return Constant(parts[0].dtype, shape, lambda: np.concatenate([p.load() for p in parts]))


def _paired(parts: list[Constant]) -> Constant:
    """The parts, of one shape, whose rows alternate two by two."""
    pairs = [
        Constant(a.dtype, (2 * a.shape[0], *a.shape[1:]), partial(_alternating, a, b))
        for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _concatenated(pairs)


def _alternating(first: Constant, second: Constant) -> np.ndarray:
    return np.stack([first.load(), second.load()], 1).reshape(-1, *first.shape[1:])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
