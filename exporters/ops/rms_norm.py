"""Root-mean-square normalisation, alone and with the residual sum in front (Zhang & Sennrich, 2019)."""

from __future__ import annotations

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import fused_op


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _lower_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return onnx_ops.symbolic(
        "::RMSNormalization",
        [x, weight],
        dict(axis=-1, epsilon=eps, stash_type=1),
        dtype=x.dtype,
        shape=x.shape,
        version=23,
    )


def _lower_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # Outputs 1 and 2 are the mean and inverse deviation, float32 always, which inference does not need.
    normed, _, _, total = onnx_ops.symbolic_multi_out(
        "com.microsoft::SkipSimplifiedLayerNormalization",
        [x, residual, weight],
        dict(epsilon=eps),
        dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
        shapes=[x.shape, (1,), (1,), x.shape],
        version=1,
    )
    return normed, total


def _decompose_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _lower_rms_norm(total, weight, eps), total


@fused_op({"onnx/fused": _lower_rms_norm, "onnx/standard": _lower_rms_norm})
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Args:
        x: [..., H]; normalised in float32 whatever its dtype.
        weight: [H].
        eps: added to the mean square.
    """
    return _normalise(x, weight, eps)


@fused_op({"onnx/fused": _lower_add_rms_norm, "onnx/standard": _decompose_add_rms_norm})
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``total = x + residual``; returns (rms_norm(total), total), both [..., H]."""
    total = x + residual
    return _normalise(total, weight, eps), total
