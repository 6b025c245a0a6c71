"""QuantizedTensor: the one canonical form of a quantised weight, with a decoder per checkpoint format.

The canonical form is unsigned codes with unsigned zero points: weight = (code - zero_point) * scale; or codes into a
table of values (exporters/encodings.py): weight = table[code] * scale. A decoder only moves bits; it never rounds, so
codes, scales and zero points are those of the checkpoint.
The decoders are in `exporters.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporters.encodings import ENCODINGS, INTEGER, values
from exporters.errors import QuantizationError

Array = np.ndarray[Any, Any]
AGAIN = "Quantise the checkpoint again"
#: bits of a code -> bits of the field that it is kept in: a whole number of fields fills a byte
FIELDS: Mapping[int, int] = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight of shape [N, K] in groups of `group` along K (group = K: one scale per row; the last may be short).

    Attributes:
        codes: uint8 [N, ceil(K*F/8)], unsigned codes along K in fields of F = FIELDS[bits] bits, low bits first.
        scales: float32 [N, ceil(K/group)], the exact widening of what was stored; `scale_dtype` names the stored type.
        zero_points: uint8 [N, ceil(K/group)], or None when symmetric, which means 2**(bits-1).
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
        if self.bits not in FIELDS:
            raise QuantizationError(
                f"{self.bits} bits", where=where, way_out=f"Supported: {', '.join(map(str, FIELDS))}"
            )
        if self.encoding != INTEGER and (self.zero_points is not None or ENCODINGS[self.encoding].bits != self.bits):
            raise QuantizationError(
                f"{self.encoding} of {self.bits} bits or with zero points", where=where, way_out=AGAIN
            )
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(columns)):
            raise QuantizationError(f"order is not a permutation of {columns} columns", where=where, way_out=AGAIN)
        if not 1 <= self.group <= max(columns, 1):
            raise QuantizationError(f"a group of {self.group} columns, K = {columns}", where=where, way_out=AGAIN)
        grid = (rows, -(-columns // self.group))
        wanted = {"codes": ((rows, -(-columns * FIELDS[self.bits] // 8)), np.uint8), "scales": (grid, np.float32)}
        if self.zero_points is not None:
            wanted["zero_points"] = (grid, np.uint8)
        for name, (shape, dtype) in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise QuantizationError(
                    f"{name} is {array.dtype} {array.shape}, wanted {np.dtype(dtype)} {shape}",
                    where=where,
                    way_out=AGAIN,
                )

    def take(self, rows: Any) -> QuantizedTensor:
        """The matrix of some of the rows, by a slice or by indices [M]."""
        codes = self.codes[rows]
        points = None if self.zero_points is None else self.zero_points[rows]
        shape = (len(codes), self.shape[1])
        return replace(self, codes=codes, scales=self.scales[rows], zero_points=points, shape=shape)

    def unpack(self) -> Array:
        """The codes, uint8 [N, K]."""
        field = FIELDS[self.bits]
        if field == 8:
            return self.codes
        parts = [(self.codes >> np.uint8(shift)) & np.uint8((1 << field) - 1) for shift in range(0, 8, field)]
        return np.ascontiguousarray(np.stack(parts, -1).reshape(self.shape[0], -1)[:, : self.shape[1]])

    def per_column(self, values: Array) -> Array:
        """[N, groups] -> [N, K]: every stored column's own value."""
        return np.repeat(values, self.group, 1)[:, : self.shape[1]]

    def dequantize(self) -> Array:
        """The weight in natural order, float32 [N, K]: one rounding at most, none for a 16-bit scale."""
        if self.encoding == INTEGER:
            weight = self.unpack().astype(np.float32)
            if self.zero_points is None:
                weight -= np.float32(1 << (self.bits - 1))
            else:
                weight -= self.per_column(self.zero_points)
        else:
            weight = values(self.encoding)[self.unpack()]
        weight *= self.scales if self.scales.shape[1] == 1 else self.per_column(self.scales)
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
        group: int | None = None,
        encoding: str = INTEGER,
        order: Array | None = None,
    ) -> QuantizedTensor:
        """Pack unsigned codes, uint8 [N, K] in stored order; without ``group`` the scales [N, K/group] give it."""
        rows, columns = codes.shape
        if codes.dtype != np.uint8 or (codes.size and int(codes.max()) >= 1 << bits):
            raise QuantizationError(f"codes are not uint8 below 2**{bits}", where=source, way_out=AGAIN)
        if group is None:
            group = columns // scales.shape[1] if scales.shape[1] else 0
        packed, field = np.ascontiguousarray(codes), FIELDS.get(bits, 8)
        if field < 8:
            padded = np.pad(codes, ((0, 0), (0, -columns % (8 // field))))
            packed = np.zeros((rows, padded.shape[1] * field // 8), np.uint8)
            for i, shift in enumerate(range(0, 8, field)):
                packed |= padded[:, i :: 8 // field] << np.uint8(shift)
        return cls(packed, scales, zero_points, bits, group, (rows, columns), source, scale_dtype, encoding, order)
