"""What VQ decoders do between their convolutions, in one pass over the data: norm with SiLU, bias with Snake."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from exporters.ops._registry import fused_op
from exporters.ops.snake import snake


@fused_op({})
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU of the group norm (Wu & He, 2018) of ``x`` [B, C, ...]; weight and bias [C]."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@fused_op({})
def bias_snake(x: Tensor, bias: Tensor) -> Tensor:
    """``snake(x + bias)`` with x [B, C, ...] and bias [C]: the bias of the convolution that made x."""
    return snake(x + bias.reshape(1, -1, *[1] * (x.dim() - 2)))
