"""Matrix product and embedding lookup on block-quantised weights, in the layout of MatMulNBits.

Codes are unsigned, packed along K with the low bits first: [N, K/G, G*bits/8] uint8; scales are [N, K/G];
zero points are packed the same way along the blocks, [N, ceil(K/G*bits/8)] uint8, or absent, which means
2^(bits-1). Source of the layout: com.microsoft.MatMulNBits in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import fused_op


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpacks uint8 [..., P] into uint8 [..., P*8/bits], low bits first (bits: 2, 4 or 8)."""
    if bits == 8:
        return packed
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int) -> Tensor:
    """float32 weights [N, K] of packed rows: (code - zero point) * scale."""
    rows, blocks = codes.shape[0], codes.shape[1]
    values = unpack(codes, bits).float()
    if zeros is None:
        centred = values - 2 ** (bits - 1)
    else:
        centred = values - unpack(zeros, bits)[:, :blocks].unsqueeze(-1).float()
    return (centred * scales.unsqueeze(-1)).reshape(rows, -1)[:, :columns]


def _lower_matmul_nbits(x, codes, scales, zeros, bias, bits, columns):
    block = codes.shape[2] * 8 // bits
    return onnx_ops.symbolic(
        "com.microsoft::MatMulNBits",
        [x, codes, scales, zeros, None, bias],
        dict(K=columns, N=codes.shape[0], bits=bits, block_size=block, accuracy_level=1),
        dtype=x.dtype,
        shape=(*x.shape[:-1], codes.shape[0]),
        version=1,
    )


def _lower_dequantize(x, codes, scales, zeros, bias, bits, columns):
    """DequantizeLinear in blocks; exporters/passes/type_codes.py then gives the packed codes their ONNX type."""
    rows, blocks, width = codes.shape
    block = width * 8 // bits
    weight = onnx_ops.symbolic(
        "::DequantizeLinear",
        [codes, scales, zeros],
        dict(axis=1, block_size=block),
        dtype=x.dtype,
        shape=(rows, blocks * block),
        version=23,
    )
    turned = weight[:, :columns].t() if blocks * block != columns else weight.t()
    y = onnx_ops.symbolic("::MatMul", [x, turned], {}, dtype=x.dtype, shape=(*x.shape[:-1], rows), version=13)
    return y if bias is None else y + bias


@fused_op({"onnx/fused": _lower_matmul_nbits, "onnx/standard": _lower_dequantize})
def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, columns: int
) -> Tensor:
    """``x @ W.T + bias`` with x [..., K], W [N, K] dequantised from its codes; returns [..., N].

    Args:
        columns: K; the last block may reach past it, and what it holds there is ignored.
    """
    y = x @ _dequantize(codes, scales, zeros, bits, columns).to(x.dtype).t()
    return y if bias is None else y + bias


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` of a table, as ONNX's own Gather."""
    return onnx_ops.symbolic(
        "::Gather", [table, ids], dict(axis=0), dtype=table.dtype, shape=(*ids.shape, *table.shape[1:]), version=13
    )


def unpack_onnx(packed: Tensor, bits: int) -> Tensor:
    """``unpack`` with BitShift: PyTorch's own shift is exported as an arithmetic one, whose result is int8."""
    if bits == 8:
        return packed
    parts = [packed]
    for shift in range(bits, 8, bits):
        by = torch.full((), shift, dtype=packed.dtype)
        parts.append(
            onnx_ops.symbolic(
                "::BitShift", [packed, by], dict(direction="RIGHT"), dtype=packed.dtype, shape=packed.shape, version=11
            )
        )
    return torch.stack([part & (2**bits - 1) for part in parts], -1).flatten(-2)


def _lower_embedding(ids, codes, scales, zeros, bits, columns):
    # Indexing with a tensor would become a GatherND that transposes the whole table first.
    rows, blocks = gather(codes, ids), scales.shape[1]
    values = unpack_onnx(rows, bits).to(torch.float32)
    if zeros is None:
        centred = values - float(2 ** (bits - 1))
    else:
        points = unpack_onnx(gather(zeros, ids), bits)[..., :blocks]
        centred = values - points.unsqueeze(-1).to(torch.float32)
    return (centred * gather(scales, ids).unsqueeze(-1)).flatten(2)[..., :columns]


@fused_op({"onnx/fused": _lower_embedding, "onnx/standard": _lower_embedding})
def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Rows ``ids`` [B, S] of the dequantised table [V, K]; returns float32 [B, S, K].

    Only the rows asked for are dequantised, from the very tensors that the tied head multiplies with.
    """
    flat = ids.reshape(-1)
    rows = _dequantize(codes[flat], scales[flat], None if zeros is None else zeros[flat], bits, columns)
    return rows.reshape(*ids.shape, columns)
