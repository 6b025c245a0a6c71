"""Drop-in modules that carry fused ops into a transformers model: same call, same result, other kernel."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters import ops
from exporters.activations import Activation
from exporters.blocks import BlockLayout
from exporters.encodings import INTEGER


class Shared:
    """Refers to a module without registering it, so that a weight has exactly one name in the graph."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __call__(self) -> nn.Module:
        return self._module


def _bytes(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8)


class QuantizedWeight(nn.Module):
    """Buffers of one block-quantised matrix, in the layout of ``edge::quantized_linear``.

    Args:
        rows, columns: N and K.
        layout: bits per code, columns per block, whether zero points are stored, what the codes stand for.
        ordered: the columns are in act-order: stored column j multiplies input feature order[j].
    """

    def __init__(self, rows: int, columns: int, layout: BlockLayout, ordered: bool = False):
        super().__init__()
        blocks = -(-columns // layout.block)
        self.bits, self.columns, self.encoding = layout.bits, columns, layout.encoding
        self.register_buffer("codes", _bytes(rows, blocks, layout.block * layout.bits // 8))
        self.register_buffer("scales", torch.empty(rows, blocks))
        self.register_buffer("zeros", _bytes(rows, -(-blocks * layout.bits // 8)) if layout.zero_points else None)
        self.register_buffer("order", torch.empty(columns, dtype=torch.int32) if ordered else None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias``."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.encoding != INTEGER:
            return ops.table_linear(x, self.codes, self.scales, bias, self.encoding, self.columns)
        return ops.quantized_linear(x, self.codes, self.scales, self.zeros, bias, self.bits, self.columns)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised rows."""
        if self.encoding != INTEGER:
            return ops.table_embedding(ids, self.codes, self.scales, self.encoding, self.columns)
        return ops.quantized_embedding(ids, self.codes, self.scales, self.zeros, self.bits, self.columns)


class FloatWeight(nn.Module):
    """A float matrix behind the same two calls."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias``."""
        return F.linear(x, self.weight, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table."""
        return F.embedding(ids, self.weight)


class FusedLinear(nn.Module):
    """A linear layer over a QuantizedWeight or FloatWeight, whose input may be rounded first."""

    def __init__(self, matrix: nn.Module, bias: nn.Parameter | None, activation: Activation | None = None):
        super().__init__()
        self.matrix, self.bias, self.activation = matrix, bias, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = self.activation(x)
        return self.matrix.linear(x, self.bias)


class LinearSlice(nn.Module):
    """Columns ``start:stop`` of a joined projection.

    Each slice calls the whole projection; common-subexpression elimination then leaves one call in the graph.
    """

    def __init__(self, joined: FusedLinear, start: int, stop: int):
        super().__init__()
        self._joined, self._start, self._stop = Shared(joined), start, stop

    def forward(self, x: Tensor) -> Tensor:
        return self._joined()(x)[..., self._start : self._stop]


class TiedHead(nn.Module):
    """The language-model head that multiplies with the embedding's own table."""

    def __init__(self, matrix: nn.Module, bias: nn.Parameter | None = None):
        super().__init__()
        self._matrix, self.bias = Shared(matrix), bias

    def forward(self, x: Tensor) -> Tensor:
        return self._matrix().linear(x, self.bias)


class FusedEmbedding(nn.Module):
    """Token embedding over a QuantizedWeight or FloatWeight."""

    def __init__(self, matrix: nn.Module):
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)


class FusedRMSNorm(nn.Module):
    """RMSNorm through ``edge::rms_norm``."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class PlainRMSNorm(nn.Module):
    """RMSNorm without a weight."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, torch.ones(x.shape[-1]), self.eps)


class ScaledEmbedding(FusedEmbedding):
    """Token embedding whose rows are multiplied by a constant; a tied head reads the table without it."""

    def __init__(self, matrix: nn.Module, scale: float):
        super().__init__(matrix)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def takes_positions(table: nn.Embedding) -> bool:
    """Whether a table is called with a mask and positions (OPT's and BioGPT's classes) instead of with ids."""
    return "position_ids" in inspect.signature(type(table).forward).parameters


class PositionEmbedding(FusedEmbedding):
    """Rows by position from ``offset`` on; called as the families do that can also derive positions from a mask."""

    def __init__(self, matrix: nn.Module, offset: int):
        super().__init__(matrix)
        self.offset = offset

    def forward(self, mask: Tensor, past: int = 0, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(position_ids + self.offset)


class RopeTables(nn.Module):
    """Rotary embedding by table, one for each kind of layer: whatever scaling the family has is in the numbers.

    Args:
        widths: kind of layer ("" where there is one table) -> R, the angles of a position.
        halves: both halves of the R angles are the same, so that the table [C, R/2] holds them once.
    """

    def __init__(self, capacity: int, widths: Mapping[str, int], halves: bool):
        super().__init__()
        self.halves = halves
        for kind, width in widths.items():
            for name in ("cos", "sin"):
                shape = (capacity, width // 2 if halves else width)
                self.register_buffer(table_name(kind, name), torch.empty(shape))

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str = "") -> tuple[Tensor, Tensor]:
        cos, sin = (getattr(self, table_name(layer_type, name)) for name in ("cos", "sin"))
        if self.halves:
            return ops.rope_angles(cos, sin, position_ids)
        return F.embedding(position_ids, cos), F.embedding(position_ids, sin)


def table_name(kind: str, name: str) -> str:
    """Name of a buffer of RopeTables."""
    return f"{kind}_{name}" if kind else name
