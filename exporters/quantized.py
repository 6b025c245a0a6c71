"""QuantizedTensor: the one canonical form of a quantised weight, with a decoder per checkpoint format.

The canonical form is unsigned codes with unsigned zero points: weight = (code - zero_point) * scale. A decoder only
moves bits; it never rounds, so codes, scales and zero points are those of the checkpoint.
The decoders are in `exporters.compressed_tensors_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.errors import QuantizationError

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
