"""Codes to the decoder's first activations: one gather per codebook, from tables that hold the projection too.

A VQ decoder looks a code up and multiplies it by a 1x1 convolution. Both are linear in the table's rows, so the
product table is computed once, in float64, and rounded once: gather(E) @ W.T + b == gather(E @ W.T + b).
"""
from __future__ import annotations

from torch import Tensor

from exporters.ops._registry import fused_op


@fused_op({})
def codebook_lookup(codes: Tensor, tables: Tensor) -> Tensor:
    """Sum over codebooks of their rows.

    Args:
        codes: integer [B, Q, ...] with one plane per codebook (residual VQ sums them).
        tables: [Q, size, C]; the first one holds the bias of the projection.

    Returns:
        float [B, C, ...].
    """
    total = tables[0][codes[:, 0]]
    for index in range(1, tables.shape[0]):
        total = total + tables[index][codes[:, index]]
    return total.movedim(-1, 1)
