"""GPTQ: weights rounded one column at a time, each rounding error repaid by the columns still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), algorithm 1 with group-wise asymmetric grids and no reordering of
columns, so that the stored groups are contiguous along K.
"""

from dataclasses import dataclass

import torch


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
    for shrink in torch.linspace(1.0, 0.8, 9).tolist():
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


def round_to(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (float) of `values` on a grid, and the values they stand for."""
    codes = (values / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes, (codes - zero) * scale


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> Grid:
    """The plain baseline: every weight to its nearest code. weight float32 [N,K]."""
    grouped = weight.unflatten(1, (-1, group))
    scale, zero = group_grid(grouped.flatten(0, 1), bits)
    codes = round_to(grouped.flatten(0, 1), scale, zero, bits)[0].reshape(weight.shape)
    return Grid(codes.to(torch.int8), scale.reshape(len(weight), -1), zero.reshape(len(weight), -1).to(torch.int8))


def gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, damping: float = 0.01) -> Grid:
    """Quantise weight float32 [N,K] for inputs whose second moments are hessian float [K,K].

    Raises torch.linalg.LinAlgError when the damped Hessian is not positive definite.
    """
    rows, width = weight.shape
    hessian, work = hessian.double().clone(), weight.double().clone()
    unused = hessian.diagonal() == 0
    hessian[unused, unused] = 1.0
    hessian += torch.eye(width) * damping * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros(rows, width, dtype=torch.int8)
    scales, zeros = torch.zeros(rows, width // group), torch.zeros(rows, width // group, dtype=torch.int8)
    for column in range(width):
        if column % group == 0:
            # The grid is fitted to what earlier columns left of this group, not to the original weights.
            scale, zero = group_grid(work[:, column : column + group].float(), bits)
            scales[:, column // group], zeros[:, column // group] = scale[:, 0], zero[:, 0].to(torch.int8)
        code, value = round_to(work[:, column : column + 1].float(), scale, zero, bits)
        codes[:, column] = code[:, 0].to(torch.int8)
        error = (work[:, column] - value[:, 0].double()) / upper[column, column]
        work[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return Grid(codes, scales, zeros)


def channel_grid(weight: torch.Tensor) -> Grid:
    """Symmetric 8-bit codes with one scale for each row of weight float32 [N,K]."""
    scale = half_scale(weight.abs().amax(1, keepdim=True) / 127)
    codes = (weight / scale).round().clamp(-127, 127)
    return Grid(codes.to(torch.int8), scale, torch.zeros(len(weight), 1, dtype=torch.int8))
