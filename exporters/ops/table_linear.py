"""Matrix product and embedding lookup on weights whose codes stand for the values of a table: fp8, fp4, nf4.

Codes and scales lie as those of ``edge::quantized_linear`` do; W = table[code] * scale, and the table is the one of
exporters/encodings.py. PyTorch cannot trace all of these types, so ONNX's lowerings leave a node of domain "edge.build"
that exporters/passes/spell_tables.py spells out, in the form that its runtime has for the encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.encodings import ENCODINGS, values
from exporters.ops._registry import BUILD, fused_op
from exporters.ops.quantized_linear import gather, unpack, unpack_onnx

#: encoding -> operator that the product leaves with; the rest is looked up in the table. A standard operator, and what
#: ONNX Runtime has: bitsandbytes' own bytes for nf4, and integers for fp4, whose values times two are whole.
Forms = Mapping[str, str]
GATHER = "Gather"
STANDARD: Forms = {"float8_e4m3fn": "DequantizeLinear", "float8_e5m2": "DequantizeLinear"}
FUSED: Forms = {**STANDARD, "nf4": "MatMulBnb4", "float4_e2m1fn": "MatMulNBits"}


#: encoding -> PyTorch's own type of its codes
_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def _look_up(codes: Tensor, encoding: str) -> Tensor:
    """float32 values of unpacked codes."""
    if encoding in _TYPES:
        return codes.view(_TYPES[encoding]).float()
    # Made of fills: a tensor out of Python numbers is a mutation to the tracer that decomposes this.
    table = torch.stack([torch.full((), value, device=codes.device) for value in values(encoding).tolist()])
    return table[codes.long()]


def _dequantize(codes: Tensor, scales: Tensor, encoding: str, columns: int) -> Tensor:
    """float32 weights [N, K] of packed rows: table[code] * scale."""
    looked_up = _look_up(unpack(codes, ENCODINGS[encoding].bits), encoding)
    return (looked_up * scales.float().unsqueeze(-1)).reshape(codes.shape[0], -1)[:, :columns]


def lower_product(forms: Forms) -> Callable[..., Tensor]:
    """The lowering to ONNX for a runtime that has ``forms``."""
    return partial(_lower_product, forms)


def _lower_product(forms: Forms, x, codes, scales, bias, encoding, columns):
    y = onnx_ops.symbolic(
        f"{BUILD}::TableProduct",
        [x, codes, scales],
        dict(encoding=encoding, columns=columns, form=forms.get(encoding, GATHER)),
        dtype=x.dtype,
        shape=(*x.shape[:-1], codes.shape[0]),
        version=1,
    )
    return y if bias is None else y + bias


@fused_op({"onnx/fused": lower_product(FUSED), "onnx/standard": lower_product(STANDARD)})
def table_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, encoding: str, columns: int) -> Tensor:
    """``x @ W.T + bias`` with x [..., K], W [N, K] looked up by its codes; returns [..., N].

    Args:
        codes: uint8 [N, nb, block*bits/8], low bits first.
        scales: [N, nb].
        encoding: key of exporters/encodings.py.
        columns: K; the last block may reach past it, and what it holds there is ignored.
    """
    y = x @ _dequantize(codes, scales, encoding, columns).to(x.dtype).t()
    return y if bias is None else y + bias


def _lower_embedding(ids, codes, scales, encoding, columns):
    numbers = unpack_onnx(gather(codes, ids), ENCODINGS[encoding].bits).to(torch.int32)
    table = onnx_ops.symbolic(
        "::Constant", [], dict(value_floats=values(encoding).tolist()), dtype=torch.float32,
        shape=(1 << ENCODINGS[encoding].bits,), version=13,
    )  # fmt: skip
    looked_up = gather(table, numbers)
    return (looked_up * gather(scales, ids).float().unsqueeze(-1)).flatten(2)[..., :columns]


@fused_op({"onnx/fused": _lower_embedding, "onnx/standard": _lower_embedding})
def table_embedding(ids: Tensor, codes: Tensor, scales: Tensor, encoding: str, columns: int) -> Tensor:
    """Rows ``ids`` [B, S] of the matrix that ``table_linear`` multiplies with; returns float32 [B, S, K]."""
    flat = ids.reshape(-1)
    return _dequantize(codes[flat], scales[flat], encoding, columns).reshape(*ids.shape, columns)
