"""SwiGLU on the joined gate and up projections (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import fused_op


def _lower(joined: Tensor) -> Tensor:
    half = (*joined.shape[:-1], joined.shape[-1] // 2)
    gate, up = onnx_ops.symbolic_multi_out(
        "::Split", [joined], dict(axis=-1, num_outputs=2), dtypes=[joined.dtype] * 2, shapes=[half, half], version=18
    )
    # QuickGelu is x * sigmoid(alpha * x): with alpha 1 it is SiLU, in one pass over the data.
    silu = onnx_ops.symbolic(
        "com.microsoft::QuickGelu", [gate], dict(alpha=1.0), dtype=gate.dtype, shape=gate.shape, version=1
    )
    return silu * up


@fused_op({"onnx/fused": _lower})
def swiglu(joined: Tensor) -> Tensor:
    """``silu(gate) * up`` where ``joined`` [..., 2I] holds gate then up; returns [..., I]."""
    gate, up = torch.chunk(joined, 2, -1)
    return F.silu(gate) * up
