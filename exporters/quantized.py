"""QuantizedTensor: the one canonical form of a quantised weight, with a decoder per checkpoint format.

The canonical form is unsigned codes with unsigned zero points: weight = (code - zero_point) * scale; or codes into a
table of values (exporters/encodings.py): weight = table[code] * scale. A decoder only moves bits; it never rounds, so
codes, scales and zero points are those of the checkpoint.
The decoders are in `exporters.compressed_tensors_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.encodings import ENCODINGS, INTEGER, values
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
        encoding: INTEGER, or the key of exporters/encodings.py that gives each code its value.
        order: int32 [K] of an act-order matrix, None for one in natural order: stored column j, which the groups run
            along, multiplies input feature order[j].
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int
    group: int
    shape: tuple[int, int]
    source: str
    scale_dtype: str
    encoding: str = INTEGER
    order: Array | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        where = f"QuantizedTensor from {self.source}"
        if self.bits not in BITS:
            raise QuantizationError(f"{self.bits} bits", where=where, way_out=f"Supported: {BITS}")
        if self.encoding != INTEGER and (self.zero_points is not None or ENCODINGS[self.encoding].bits != self.bits):
            raise QuantizationError(f"{self.encoding} of {self.bits} bits or with zero points", where=where)
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(columns)):
            raise QuantizationError(f"order is not a permutation of {columns} columns", where=where)
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
        """The weight in natural order, float32 [N, K]: one rounding at most, none for a 16-bit scale."""
        rows, columns = self.shape
        if self.encoding == INTEGER:
            weight = self.unpack().astype(np.float32)
            if self.zero_points is None:
                weight -= np.float32(1 << (self.bits - 1))
            else:
                weight -= np.repeat(self.zero_points, self.group, 1)
        else:
            weight = values(self.encoding)[self.unpack()]
        weight = weight.reshape(rows, columns // self.group, self.group)
        weight *= self.scales[:, :, None]
        weight = weight.reshape(rows, columns)
        return weight if self.order is None else weight[:, np.argsort(self.order)]

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
