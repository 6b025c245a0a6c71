"""Proof that the student's own quantisation arrived: codes, scales and zero points read back from the artifacts.

A backend gives what stands in its files, the comparison here is bit for bit and knows no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporters.blocks import PARTS
from exporters.encodings import INTEGER, values
from exporters.program import Inherited, Program
from exporters.progress import Bytes, ignore
from exporters.quantized import QuantizedTensor

#: The encoding of weights that stand in an artifact as float32.
FLOAT = "float32"


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix as an artifact holds it, unpacked.

    Attributes:
        codes: uint8 [N, columns or more].
        scales: float32 [N, nb].
        zero_points: uint8 [N, nb], or None, which means 2^(bits-1).
        bits, block: bits per code, columns per scale.
        encoding: what the codes stand for (exporters/encodings.py); FLOAT where they are the weights, float32 [N, K].
        order: int [K], the gather of the input's features in front of the matrix, or None for none.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    block: int
    encoding: str = INTEGER
    order: np.ndarray | None = None

    def weights(self) -> np.ndarray:
        """float32 [N, columns or more]: what is multiplied with."""
        if self.encoding == FLOAT:
            return self.codes
        table = None if self.encoding == INTEGER else values(self.encoding)
        points = _zeros(self.zero_points, self.scales, self.bits).astype(np.float32)
        width = self.codes.shape[1]
        scales, points = (np.repeat(part, self.block, 1)[:, :width] for part in (self.scales, points))
        return (self.codes - points if table is None else table[self.codes]) * scales


class LazyMatrices(Mapping[str, StoredMatrix]):
    """Matrices by prefix, each read and unpacked when it is asked for; nothing is kept, so keep what is used twice."""

    def __init__(self, readers: Mapping[str, Callable[[], StoredMatrix]]) -> None:
        self._readers = readers

    def __getitem__(self, prefix: str) -> StoredMatrix:
        return self._readers[prefix]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Inheritance:
    """How many of the student's quantised tensors (codes, scales and zero points of each matrix) are identical."""

    identical: int = 0
    total: int = 0
    mismatches: tuple[str, ...] = field(default=())

    def __add__(self, other: Inheritance) -> Inheritance:
        return Inheritance(
            self.identical + other.identical, self.total + other.total, self.mismatches + other.mismatches
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values for the manifest."""
        return {"identical": self.identical, "total": self.total, "mismatches": list(self.mismatches)}


def compare(
    label: str,
    program: Program,
    stored: Mapping[str, StoredMatrix],
    student: Mapping[str, QuantizedTensor],
    progress: Bytes = ignore,
) -> Inheritance:
    """Compares every inherited matrix of ``program`` with what stands in an artifact, one at a time.

    Args:
        label: the artifact, for messages.
        stored: prefix of the Program's constants -> what the artifact holds.
        student: the student's quantised tensors by module name.
        progress: called with the bytes of each matrix; `size` is their sum.
    """
    checks: list[tuple[str, bool]] = []
    for prefix, inherited in program.inherited.items():
        checks += _matrix(f"{label}: {prefix}", inherited, stored.get(prefix), student)
        progress(_bytes(program, prefix))
    return Inheritance(sum(same for _, same in checks), len(checks), tuple(name for name, same in checks if not same))


def size(program: Program) -> int:
    """Bytes of all inherited matrices of a program, as it holds them."""
    return sum(_bytes(program, prefix) for prefix in program.inherited)


def _bytes(program: Program, prefix: str) -> int:
    names = (f"{prefix}.{part}" for part in PARTS)
    return sum(program.constants[name].nbytes for name in names if name in program.constants)


def _matrix(
    where: str, inherited: Inherited, stored: StoredMatrix | None, student: Mapping[str, QuantizedTensor]
) -> Iterator[tuple[str, bool]]:
    rows_in = None if inherited.row_order is None else student[inherited.row_order].order
    for source, span in zip(inherited.sources, _spans(inherited), strict=True):
        tensor = student[source]
        parts = ["codes", "scales", "zero points"]
        if tensor.order is not None:
            parts.append("order")
        same = (False,) * 4 if stored is None else _tensor(tensor, stored, span, inherited, rows_in)
        yield from zip((f"{where} ({source}) {part}" for part in parts), same, strict=False)


def _spans(inherited: Inherited) -> Iterator[slice]:
    """The rows of each source."""
    start = 0
    for index, rows in enumerate(inherited.rows):
        if inherited.paired:
            first = start - index % 2 * rows
            yield slice(first + index % 2, first + 2 * rows, 2)
        else:
            yield slice(start, start + rows)
        start += rows


def _tensor(
    tensor: QuantizedTensor, stored: StoredMatrix, rows: slice, inherited: Inherited, rows_in: np.ndarray | None
) -> tuple[bool, bool, bool, bool]:
    """Whether codes, scales, zero points and act-order are identical, compared column by column.

    The artifact's field may be wider than a code (3 bits in 4): the same numbers stand in it. Codes of another encoding
    are the student's rewritten: there the weights must be the same numbers.
    """
    if stored.encoding != tensor.encoding:
        return (np.array_equal(stored.weights()[rows, : inherited.columns], tensor.dequantize()),) * 4

    def spread(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.repeat(values[rows], stored.block, 1)[:, : inherited.columns])

    def wanted(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values if rows_in is None else values[rows_in])

    scales = wanted(tensor.per_column(tensor.scales))
    points = wanted(tensor.per_column(_zeros(tensor.zero_points, tensor.scales, tensor.bits)))
    order = None if inherited.order_folded else tensor.order
    return (
        stored.bits >= tensor.bits and np.array_equal(stored.codes[rows, : inherited.columns], wanted(tensor.unpack())),
        np.array_equal(spread(stored.scales).view(np.uint32), scales.view(np.uint32)),  # -0.0 is not 0.0
        np.array_equal(spread(_zeros(stored.zero_points, stored.scales, stored.bits)), points),
        stored.order is None if order is None else np.array_equal(stored.order, order),
    )


def _zeros(values: np.ndarray | None, like: np.ndarray, bits: int) -> np.ndarray:
    return np.full(like.shape, 2 ** (bits - 1), np.uint8) if values is None else values
