"""Lowerings of PyTorch's own operators where a backend's default translation is worse than what it offers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

ATEN = torch.ops.aten


def _onnx_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One Gemm that reads the weight as it is stored where the rows' number is fixed, else one MatMul."""
    rows = weight.shape[0]
    if all(isinstance(size, int) for size in x.shape[:-1]):
        flat = x.reshape(-1, x.shape[-1])
        y = onnx_ops.symbolic(
            "::Gemm",
            [flat, weight, bias] if bias is not None else [flat, weight],
            dict(transB=1),
            dtype=x.dtype,
            shape=(flat.shape[0], rows),
            version=13,
        )
        return y.reshape(*x.shape[:-1], rows)
    y = onnx_ops.symbolic("::MatMul", [x, weight.t()], {}, dtype=x.dtype, shape=(*x.shape[:-1], rows), version=13)
    return y if bias is None else y + bias


def _onnx_embedding(weight: Tensor, ids: Tensor, *options) -> Tensor:
    return onnx_ops.symbolic(
        "::Gather", [weight, ids], dict(axis=0), dtype=weight.dtype, shape=(*ids.shape, weight.shape[1]), version=13
    )


def _onnx_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """InstanceNormalization over [B, groups, rest]: runtimes run GroupNormalization as a chain of fifteen ops."""
    ones, zeros = torch.ones(groups), torch.zeros(groups)
    flat = x.reshape(x.shape[0], groups, -1)
    normed = onnx_ops.symbolic(
        "::InstanceNormalization",
        [flat, ones, zeros],
        dict(epsilon=eps),
        dtype=x.dtype,
        shape=flat.shape,
        version=6,
    ).reshape(x.shape)
    if weight is None or bias is None:
        return normed
    channels = x.shape[1]
    # Scale and bias per channel in one pass over the data: a batch normalisation of mean 0 and variance 1.
    return onnx_ops.symbolic(
        "::BatchNormalization",
        [normed, weight, bias, torch.zeros(channels), torch.ones(channels)],
        dict(epsilon=0.0),
        dtype=x.dtype,
        shape=x.shape,
        version=15,
    )


_ONNX = {
    ATEN.linear.default: _onnx_linear,
    ATEN.embedding.default: _onnx_embedding,
    ATEN.group_norm.default: _onnx_group_norm,
}


def aten_lowerings(target: str) -> dict[torch._ops.OpOverload, Callable]:
    """Operator -> decomposition for ``target``, such as "onnx/fused"."""
    return dict(_ONNX) if target.startswith("onnx/") else {}
