"""A quantised projection with what stands around it: a norm in front, SwiGLU or the residual sum behind.

One decode step of a projection reads its weights once and is limited by that; what is fused to it costs no further
pass over memory. Which kernels take it is a backend's affair: exporters/passes/fuse_projection.py makes these nodes for
the backends that ask for them.
"""

from __future__ import annotations

from torch import Tensor

from exporters.ops._registry import fused_op
from exporters.ops.quantized_linear import quantized_linear
from exporters.ops.rms_norm import rms_norm
from exporters.ops.swiglu import swiglu


@fused_op({})
def projection(
    x: Tensor,
    norm: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    columns: int,
    eps: float,
    gated: bool,
) -> Tensor:
    """``residual + f(rms_norm(x, norm) @ W.T + bias)`` with f SwiGLU where ``gated``, else nothing.

    Args:
        x: [..., K].
        norm: weight [K] of the norm in front, or None for none; ``eps`` is its.
        codes, scales, zeros, bias, bits, columns: see quantized_linear; W is [N, K].
        residual: [..., N], or None.
        gated: the rows of W are gate then up; the result is [..., N/2].
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = quantized_linear(x, codes, scales, zeros, bias, bits, columns)
    if gated:
        y = swiglu(y)
    return y if residual is None else y + residual
