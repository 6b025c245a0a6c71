"""Codes to the decoder's first activations: one gather per codebook, from tables that hold the projection too.

A VQ decoder looks a code up and multiplies it by a 1x1 convolution. Both are linear in the table's rows, so the
product table is computed once, in float64, and rounded once: gather(E) @ W.T + b == gather(E @ W.T + b).
"""

from __future__ import annotations

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import fused_op


def _rows(codes: Tensor, tables: Tensor, size: int) -> Tensor:
    """Row numbers in the stacked tables, like ``codes``."""
    books = codes.shape[1]
    if books == 1:
        return codes
    offsets = torch.arange(0, books * size, size, dtype=codes.dtype, device=codes.device)
    return codes + offsets.reshape(1, books, *[1] * (codes.dim() - 2))


def _lower_onnx(codes: Tensor, tables: Tensor, size: int) -> Tensor:
    rows = _rows(codes, tables, size)
    entries = onnx_ops.symbolic(
        "::Gather", [tables, rows], dict(axis=0), dtype=tables.dtype, shape=(*rows.shape, tables.shape[1]), version=13
    )
    total = entries.squeeze(1) if codes.shape[1] == 1 else entries.sum(1)
    return total.movedim(-1, 1)


@fused_op({"onnx/fused": _lower_onnx, "onnx/standard": _lower_onnx})
def codebook_lookup(codes: Tensor, tables: Tensor, size: int) -> Tensor:
    """Sum over codebooks of the rows that their codes name.

    Args:
        codes: integer [B, Q, ...] with one plane per codebook (residual VQ sums them), each below ``size``.
        tables: [Q*size, C], one codebook below the other.

    Returns:
        float [B, C, ...].
    """
    return tables[_rows(codes, tables, size)].sum(1).movedim(-1, 1)
