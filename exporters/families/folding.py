"""Folding of a codebook with the linear map behind it, and the check that every fold passes before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.errors import ExportError


class FoldMismatch(ExportError):
    """A rewritten module does not compute what the library's own does."""


def folded_table(codebook: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``codebook [n, D] @ weight [C, D, 1...].T + bias [C]``, in float64 and rounded once to the codebook's dtype."""
    matrix = weight.detach().double().reshape(weight.shape[0], -1)
    table = codebook.detach().double() @ matrix.t()
    if bias is not None:
        table = table + bias.detach().double()
    return table.to(codebook.dtype)


def assert_equal(where: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises FoldMismatch unless the largest difference is within ``tolerance`` of the largest value."""
    error = (got - expected).abs().max().item() / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
    if not error <= tolerance:
        raise FoldMismatch(
            f"the fused form differs from the library's own by {error:.2g} relative",
            where=where,
            way_out="This model has a part that the fold does not know; report its config.",
        )
