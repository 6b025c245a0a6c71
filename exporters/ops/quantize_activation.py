"""Rounding of a linear layer's input to the values of a narrow type, as quantised checkpoints with activations ask.

Bit for bit what compressed-tensors 0.20 computes in float32 (quantization/lifecycle/forward_helpers and
quantization/utils/helpers.calculate_qparams): scale, clamp, round half to even, scale back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor

from exporters.ops._registry import BUILD, fused_op


@dataclass(frozen=True)
class Format:
    """A narrow type: its bits, its range, and the bits of its mantissa and its exponents where it is a float."""

    bits: int
    low: float
    high: float
    mantissa: int | None = None
    exponents: range = range(0)


#: Encoding of an activation -> its type. OCP: 8-bit floating point 1.0, microscaling (MX) 1.0.
FORMATS = {
    "int4": Format(4, -8.0, 7.0),
    "int8": Format(8, -128.0, 127.0),
    "float8_e4m3fn": Format(8, -448.0, 448.0, 3, range(-6, 9)),
    "float4_e2m1fn": Format(4, -6.0, 6.0, 1, range(0, 3)),
}
#: In the place of a scale of 0: torch.finfo's eps of float32, and of float8_e4m3fn.
EPSILON, EPSILON_8 = 2.0**-23, 2.0**-3


def _number(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _rounded(y: Tensor, kind: Format) -> Tensor:
    """Values within the range to the nearest of the type, ties to even, in arithmetic that every backend has.

    A float's step is 2^(exponent - mantissa): the exponent is found by halving the range of what is left of |y|.
    """
    if kind.mantissa is None:
        return torch.round(y)
    least = kind.exponents.start
    step = _number(y, 2.0 ** (least - kind.mantissa))
    size = y.abs() * 2.0**-least
    for shift in (8, 4, 2, 1):
        if shift < len(kind.exponents):
            large = size >= 2.0**shift
            step = torch.where(large, step * 2.0**shift, step)
            size = torch.where(large, size * 2.0**-shift, size)
    return torch.round(y / step) * step


def _cast(y: Tensor, kind: Format) -> Tensor:
    """The same by a cast, for runtimes that round so."""
    return y.to(torch.float8_e4m3fn).to(y.dtype) if kind is FORMATS["float8_e4m3fn"] else _rounded(y, kind)


def _quantise(
    round_to: Callable[[Tensor, Format], Tensor],
    x: Tensor, encoding: str, group: int, symmetric: bool, scale: float, zero_point: int, global_scale: float,
) -> Tensor:  # fmt: skip
    kind = FORMATS[encoding]
    y = x if x.dtype is torch.float64 else x.float()
    blocks = y.unflatten(-1, (-1, group)) if group else y
    zero = None
    if scale:
        by = _number(y, scale)
        if not symmetric:
            zero = _number(y, zero_point)
    else:
        least, most = blocks.amin(-1, keepdim=True).clamp_max(0.0), blocks.amax(-1, keepdim=True).clamp_min(0.0)
        if symmetric:
            by = torch.maximum(-least, most) / _number(y, (kind.high - kind.low) / 2)
        else:
            by = (most - least) / _number(y, kind.high - kind.low)
        epsilon = EPSILON
        if global_scale:
            wide = _number(y, global_scale)
            by, epsilon = round_to((by * wide).clamp(-448.0, 448.0), FORMATS["float8_e4m3fn"]), EPSILON_8
        by = torch.where(by == 0, _number(y, epsilon), by)
        if global_scale:
            by = by / wide
        if not symmetric:
            zero = torch.round((kind.low - least / by).clamp(kind.low, kind.high))
    scaled = blocks / by
    if zero is not None:
        scaled = scaled + zero
    codes = round_to(scaled.clamp(kind.low, kind.high), kind)
    if zero is not None:
        codes = codes - zero
    values = codes * by
    return (values.flatten(-2) if group else values).to(x.dtype)


def _lower_cast(*arguments) -> Tensor:
    return _quantise(_cast, *arguments)


def _lower_int8(x, encoding, group, symmetric, scale, zero_point, global_scale):
    """int8 by rows as one node, from which exporters/passes/spell_integers.py makes integer products."""
    if encoding != "int8" or group:
        return _lower_cast(x, encoding, group, symmetric, scale, zero_point, global_scale)
    attributes = dict(symmetric=int(symmetric), scale=scale, zero_point=zero_point)
    return onnx_ops.symbolic(f"{BUILD}::Rounded", [x], attributes, dtype=x.dtype, shape=x.shape, version=1)


@fused_op({"onnx/fused": _lower_int8, "onnx/standard": _lower_cast})
def quantize_activation(
    x: Tensor, encoding: str, group: int, symmetric: bool, scale: float, zero_point: int, global_scale: float
) -> Tensor:
    """``x`` [..., K] rounded to ``encoding``; float32 throughout, whatever the dtype of x.

    Args:
        encoding: key of FORMATS.
        group: columns that share a scale, a divisor of K; 0 for all of a row.
        symmetric: the zero point is 0.
        scale: the static scale, a float32 number; 0 to take each row's or group's own from its values.
        zero_point: of a static scale.
        global_scale: NVFP4's: scales of groups are multiplied by it, rounded to float8_e4m3fn, and divided by it; 0
            for none.
    """
    return _quantise(_rounded, x, encoding, group, symmetric, scale, zero_point, global_scale)
