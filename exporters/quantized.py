"""QuantizedTensor: the one canonical form of a quantised weight, with a decoder per checkpoint format.

The canonical form is unsigned codes with unsigned zero points: weight = (code - zero_point) * scale. A decoder only
moves bits; it never rounds, so codes, scales and zero points are those of the checkpoint.

compressed-tensors (github.com/vllm-project/compressed-tensors 0.20, compressors/pack_quantized and naive_quantized)
stores signed integers q in [-2**(bits-1), 2**(bits-1)); the code is q + 2**(bits-1), likewise for zero points, so
(q - z) = (code - zero_point). `pack-quantized` holds q + 2**(bits-1) in int32 words, element i of a row at bit i*bits,
low bits first: little-endian, those words are the canonical bytes with padding at each row's end. Its zero points are
packed the same way along N. `int-quantized` holds q as int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
BITS = (4, 8)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight of shape [N, K] in groups of `group` along K (group = K: one scale per row).

    Attributes:
        codes: uint8 [N, ceil(K*bits/8)], unsigned codes along K, low bits first.
        scales: float32 [N, K/group], the exact widening of what was stored; `scale_dtype` names the stored type.
        zero_points: uint8 [N, K/group], or None when symmetric, which means 2**(bits-1).
        source: the checkpoint format it came from.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int
    group: int
    shape: tuple[int, int]
    source: str
    scale_dtype: str

    def __post_init__(self) -> None:
        rows, columns = self.shape
        where = f"QuantizedTensor from {self.source}"
        if self.bits not in BITS:
            raise QuantizationError(f"{self.bits} bits", where=where, way_out=f"Supported: {BITS}")
        if self.group < 1 or columns % self.group:
            raise QuantizationError(f"group {self.group} does not divide K = {columns}", where=where)
        grid = (rows, columns // self.group)
        wanted = {"codes": ((rows, -(-columns * self.bits // 8)), np.uint8), "scales": (grid, np.float32)}
        if self.zero_points is not None:
            wanted["zero_points"] = (grid, np.uint8)
        for name, (shape, dtype) in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise QuantizationError(
                    f"{name} is {array.dtype} {array.shape}, wanted {np.dtype(dtype)} {shape}", where=where
                )

    def unpack(self) -> Array:
        """The codes, uint8 [N, K]."""
        if self.bits == 8:
            return self.codes
        pairs = np.stack((self.codes & 0xF, self.codes >> 4), axis=-1)
        return np.ascontiguousarray(pairs.reshape(self.shape[0], -1)[:, : self.shape[1]])

    def dequantize(self) -> Array:
        """(code - zero_point) * scale, float32 [N, K]: one rounding at most, none for a 16-bit scale."""
        rows, columns = self.shape
        zero = 1 << (self.bits - 1) if self.zero_points is None else self.zero_points.astype(np.float32)[:, :, None]
        values = self.unpack().astype(np.float32).reshape(rows, columns // self.group, self.group)
        values -= np.float32(zero) if isinstance(zero, int) else zero
        values *= self.scales[:, :, None]
        return values.reshape(rows, columns)

    @classmethod
    def from_codes(
        cls,
        codes: Array,
        scales: Array,
        zero_points: Array | None,
        *,
        bits: int,
        source: str = "codes",
        scale_dtype: str = "float32",
    ) -> QuantizedTensor:
        """Pack unsigned codes, uint8 [N, K]; the group follows from scales [N, K/group]."""
        rows, columns = codes.shape
        if codes.dtype != np.uint8 or (codes.size and int(codes.max()) >= 1 << bits):
            raise QuantizationError(f"codes are not uint8 below 2**{bits}", where=source)
        if bits == 4:
            padded = np.pad(codes, ((0, 0), (0, columns % 2)))
            codes = padded[:, 0::2] | padded[:, 1::2] << 4
        group = columns // scales.shape[1] if scales.shape[1] else 0
        return cls(codes, scales, zero_points, bits, group, (rows, columns), source, scale_dtype)


@dataclass(frozen=True)
class WeightScheme:
    """How one module's weight is stored, from config.json's quantization_config."""

    format: str
    bits: int
    symmetric: bool
    group: int | None  # None: one scale per output channel
    per_tensor: bool = False


Read = Callable[[str], "torch.Tensor"]
Layout = dict[str, tuple[frozenset[str], tuple[tuple[int, ...], ...]]]
_FLOATS = frozenset({"F32", "F16", "BF16"})


def _scale_shapes(scheme: WeightScheme, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    if scheme.per_tensor:
        return ((1,), (1, 1), ())
    if scheme.group is None:
        return ((shape[0], 1), (shape[0],))
    return ((shape[0], shape[1] // scheme.group),)


def _pack_layout(scheme: WeightScheme, shape: tuple[int, int]) -> Layout:
    rows, columns = shape
    words = -(-columns * scheme.bits // 32)
    layout: Layout = {
        "weight_packed": (frozenset({"I32"}), ((rows, words),)),
        "weight_scale": (_FLOATS, _scale_shapes(scheme, shape)),
        "weight_shape": (frozenset({"I64", "I32"}), ((2,),)),
    }
    if not scheme.symmetric:
        groups = 1 if scheme.group is None else columns // scheme.group
        layout["weight_zero_point"] = (frozenset({"I32"}), ((-(-rows * scheme.bits // 32), groups),))
    return layout


def _int_layout(scheme: WeightScheme, shape: tuple[int, int]) -> Layout:
    layout: Layout = {
        "weight": (frozenset({"I8"}), (shape,)),
        "weight_scale": (_FLOATS, _scale_shapes(scheme, shape)),
    }
    if not scheme.symmetric:
        layout["weight_zero_point"] = (frozenset({"I8"}), _scale_shapes(scheme, shape))
    return layout


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _scales(read: Read, module: str, scheme: WeightScheme, shape: tuple[int, int]) -> tuple[Array, str]:
    stored = read(f"{module}.weight_scale")
    groups = 1 if scheme.group is None else shape[1] // scheme.group
    scales = stored.float().numpy().reshape((1, 1) if scheme.per_tensor else (shape[0], groups))
    if not np.isfinite(scales).all() or (scales <= 0).any():
        raise QuantizationError(
            "holds a scale that is zero, negative or not finite",
            where=f"{module}.weight_scale",
            way_out="Quantise the checkpoint again",
        )
    return np.ascontiguousarray(np.broadcast_to(scales, (shape[0], groups))), _dtype_name(stored)


def _pack_quantized(read: Read, module: str, scheme: WeightScheme, shape: tuple[int, int]) -> QuantizedTensor:
    rows, columns = shape
    stated = tuple(read(f"{module}.weight_shape").tolist())
    if stated != shape:
        raise QuantizationError(
            f"says {stated}, the model's weight is {shape}",
            where=f"{module}.weight_shape",
            way_out="Take config.json and the weights from one checkpoint",
        )
    scales, scale_dtype = _scales(read, module, scheme, shape)
    width = -(-columns * scheme.bits // 8)
    words = read(f"{module}.weight_packed").numpy().astype("<i4", copy=False)
    padded = words.view(np.uint8)
    codes = padded[:, :width]
    spare = padded[:, width:]
    if spare.any() or (columns * scheme.bits % 8 and (codes[:, -1] >> 4).any()):
        raise QuantizationError(
            f"bits beyond column {columns} are set",
            where=f"{module}.weight_packed",
            way_out="The packed width or weight_shape is wrong; quantise the checkpoint again",
        )
    zero_points = None
    if not scheme.symmetric:
        # Packed along N: transposed, a row of words is one group column's zero points.
        packed = np.ascontiguousarray(read(f"{module}.weight_zero_point").numpy().astype("<i4", copy=False).T)
        column_bytes = packed.view(np.uint8)
        if scheme.bits == 4:
            column_bytes = np.stack((column_bytes & 0xF, column_bytes >> 4), axis=-1).reshape(packed.shape[0], -1)
        zero_points = np.ascontiguousarray(column_bytes[:, :rows].T)
    return QuantizedTensor(
        codes, scales, zero_points, scheme.bits, scheme.group or columns, shape, scheme.format, scale_dtype
    )


def _int_quantized(read: Read, module: str, scheme: WeightScheme, shape: tuple[int, int]) -> QuantizedTensor:
    scales, scale_dtype = _scales(read, module, scheme, shape)
    offset = 1 << (scheme.bits - 1)

    def unsigned(name: str) -> Array:
        signed = read(f"{module}.{name}").numpy()
        if scheme.bits < 8 and signed.size and (signed.min() < -offset or signed.max() >= offset):
            raise QuantizationError(
                f"holds values outside {scheme.bits} bits",
                where=f"{module}.{name}",
                way_out="Correct num_bits, or quantise the checkpoint again",
            )
        return (signed.view(np.uint8) + np.uint8(offset)).astype(np.uint8, copy=False)

    zero_points = None
    if not scheme.symmetric:
        stored = unsigned("weight_zero_point")
        stored = stored.reshape((1, 1) if scheme.per_tensor else scales.shape)
        zero_points = np.ascontiguousarray(np.broadcast_to(stored, scales.shape))
    return QuantizedTensor.from_codes(
        unsigned("weight"), scales, zero_points, bits=scheme.bits, source=scheme.format, scale_dtype=scale_dtype
    )


Decode = Callable[[Read, str, WeightScheme, tuple[int, int]], QuantizedTensor]


@dataclass(frozen=True)
class Format:
    """One checkpoint format: which tensors a module has (dtypes, allowed shapes), and how to decode them."""

    layout: Callable[[WeightScheme, tuple[int, int]], Layout]
    decode: Decode


FORMATS: Mapping[str, Format] = {
    "pack-quantized": Format(_pack_layout, _pack_quantized),
    "int-quantized": Format(_int_layout, _int_quantized),
}
