"""Snake activation, the periodic nonlinearity of neural audio codecs (Ziyin et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.ops._registry import fused_op


@fused_op({})
def snake(x: Tensor, alpha: Tensor, inverse: Tensor) -> Tensor:
    """``x + inverse * sin(alpha * x)^2`` for x [B, C, T]; alpha and inverse are [1, C, 1].

    ``inverse`` is 1 / (alpha + 1e-9), computed once at capture instead of at every run.
    """
    wave = torch.sin(alpha * x)
    return x + inverse * (wave * wave)
