"""Integer grids for weights: scales and zero points fitted to a group of columns, and codes on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from exporters.quantized import QuantizedTensor

#: Shares of a group's range that are tried; a narrower range clips its ends and resolves the rest better.
SHRINK = torch.linspace(1.0, 0.8, 9).tolist()
#: Rows fitted at a time, so that what a fit holds besides the weight stays small.
ROWS = 4096


@dataclass(frozen=True)
class Width:
    """How a matrix is stored: bits per code and columns per scale; None is one symmetric scale for each row."""

    bits: int
    group: int | None = None

    def columns(self, width: int) -> int:
        """Columns per scale of a matrix with ``width`` of them."""
        return self.group or width

    def __str__(self) -> str:
        return f"int{self.bits} " + (f"g{self.group}" if self.group else "per row")


@dataclass(frozen=True)
class Grid:
    """Integer codes of a weight: codes int8 [N,K] (signed), scales float32 [N,K/G], zero_points int8 [N,K/G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [N,K] = (code - zero_point) * scale."""
        group = self.codes.shape[1] // self.scales.shape[1]
        shifted = self.codes.float() - self.zero_points.float().repeat_interleave(group, 1)
        return shifted * self.scales.repeat_interleave(group, 1)

    def tensor(self, width: Width, source: str) -> QuantizedTensor:
        """The canonical form: unsigned codes, packed; without zero points where ``width`` has none."""
        offset = np.uint8(1 << (width.bits - 1))

        def unsigned(values: torch.Tensor) -> np.ndarray:
            return values.numpy().view(np.uint8) + offset

        zeros = None if width.group is None else unsigned(self.zero_points)
        return QuantizedTensor.from_codes(
            unsigned(self.codes), self.scales.numpy(), zeros, bits=width.bits, source=source, scale_dtype="float16"
        )


def half_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round float32 scales to values that float16 holds too, so that a backend may narrow them without loss.

    Below the smallest normal float16 the relative precision is gone, so scales are kept above it.
    """
    return scale.clamp(min=2.0**-14).half().float()


def group_grid(columns: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric scale float32 [N,1] and zero point float32 [N,1] for weights [N,G].

    The range always holds zero; of nine shrunken ranges the one with the smallest squared error is taken.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    minimum, maximum = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True).clamp(min=0)
    best = torch.full_like(minimum, float("inf"))
    best_scale, best_zero = torch.ones_like(minimum), torch.zeros_like(minimum)
    for shrink in SHRINK:
        scale = half_scale((maximum - minimum) * shrink / (high - low))
        zero = (low - minimum * shrink / scale).round().clamp(low, high)
        error = (round_to(columns, scale, zero, bits)[1] - columns).square().sum(1, keepdim=True)
        better = error < best
        best, best_scale, best_zero = (
            torch.where(better, error, best),
            torch.where(better, scale, best_scale),
            torch.where(better, zero, best_zero),
        )
    return best_scale, best_zero


def row_grid(columns: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric scale float32 [N,1] of whole rows, whose largest magnitude is kept; the zero point is 0.

    The lowest code is not used, as every kernel that multiplies int8 by int8 expects.
    """
    scale = half_scale(columns.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))
    return scale, torch.zeros_like(scale)


def fit(columns: torch.Tensor, width: Width) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [N,1] of one group [N,G]."""
    return row_grid(columns, width.bits) if width.group is None else group_grid(columns, width.bits)


def round_to(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (float) of `values` on a grid, and the values they stand for."""
    codes = (values / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes, (codes - zero) * scale


def round_to_nearest(weight: torch.Tensor, width: Width) -> Grid:
    """The plain method: every weight to its nearest code. weight float [N,K], in any float dtype."""
    parts = [_rounded(rows.float(), width) for rows in weight.split(ROWS)]
    return Grid(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _rounded(weight: torch.Tensor, width: Width) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grouped = weight.unflatten(1, (-1, width.columns(weight.shape[1]))).flatten(0, 1)
    scale, zero = fit(grouped, width)
    codes = round_to(grouped, scale, zero, width.bits)[0].reshape(weight.shape)
    return codes.to(torch.int8), scale.reshape(len(weight), -1), zero.reshape(len(weight), -1).to(torch.int8)
