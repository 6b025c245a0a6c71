"""A quantised matrix in the block layout of ``edge::quantized_linear``: an exact repacking, never a re-quantisation.

Layout of com.microsoft.MatMulNBits: codes [N, nb, block*bits/8] uint8, low bits first; scales [N, nb] float32;
zero points [N, ceil(nb*bits/8)] uint8, packed like the codes, or none, which means 2^(bits-1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from exporters.encodings import ENCODINGS, INTEGER, values
from exporters.errors import QuantizationError
from exporters.quantized import FIELDS, QuantizedTensor

#: MatMulNBits takes blocks of a power of two, 16 at least; above 128 there is nothing to gain.
SMALLEST, LARGEST = 16, 128


@dataclass(frozen=True)
class BlockLayout:
    """How one matrix is cut: bits of the field of a code, columns per block, whether zero points are stored, and what
    the codes stand for (exporters/encodings.py)."""

    bits: int
    block: int
    zero_points: bool
    encoding: str = INTEGER

    @classmethod
    def of(cls, tensor: QuantizedTensor, name: str = "") -> BlockLayout:
        """The layout for ``tensor``; every block lies inside one group, so it has one scale.

        A whole-row group (per channel) of K columns is cut into the largest power of two that divides K; where that
        is under 16, into blocks of 32 whose last one is padded. Codes that are narrower than their field (3 bits) and
        zero points that do not fit it keep their values in a wider one, with zero points that are written out.

        Raises:
            QuantizationError: a group that is neither a multiple of 16 nor the whole row.
        """
        power = math.gcd(tensor.group, LARGEST)
        if power < SMALLEST:
            if tensor.group < tensor.shape[1]:
                raise QuantizationError(
                    f"groups of {tensor.group} columns cannot be cut into blocks of {SMALLEST}",
                    where=name,
                    way_out="Use a group size that is a multiple of 16.",
                )
            power = 32
        field, zeros = FIELDS[tensor.bits], tensor.zero_points
        if zeros is not None and int(zeros.max(initial=0)) >> field:
            field = 8
        return cls(field, power, zeros is not None or field != tensor.bits, tensor.encoding)


def block_codes(tensor: QuantizedTensor) -> np.ndarray:
    """Codes [N, nb, block*bits/8]; the stored bytes themselves where the last block is full."""
    rows, columns = tensor.shape
    layout = BlockLayout.of(tensor)
    blocks = -(-columns // layout.block)
    if columns != blocks * layout.block or layout.bits != FIELDS[tensor.bits]:
        padded = np.full((rows, blocks * layout.block), 2 ** (layout.bits - 1), np.uint8)
        padded[:, :columns] = tensor.unpack()
        return pack_bits(padded, layout.bits).reshape(rows, blocks, -1)
    return tensor.codes.reshape(rows, blocks, -1)


def block_scales(tensor: QuantizedTensor) -> np.ndarray:
    """Scales [N, nb]: a group's scale repeats in each of its blocks."""
    return np.ascontiguousarray(tensor.scales[:, _group_of_block(tensor)])


def block_zeros(tensor: QuantizedTensor) -> np.ndarray:
    """Packed zero points [N, ceil(nb*bits/8)] of a tensor whose layout has them."""
    zeros = tensor.zero_points
    if zeros is None:
        zeros = np.full(tensor.scales.shape, 1 << (tensor.bits - 1), np.uint8)
    return pack_bits(zeros[:, _group_of_block(tensor)], BlockLayout.of(tensor).bits)


def _group_of_block(tensor: QuantizedTensor) -> np.ndarray:
    block = BlockLayout.of(tensor).block
    return np.arange(-(-tensor.shape[1] // block)) * block // tensor.group


#: buffer of a QuantizedWeight -> how it is made from the student's tensor
PARTS = {"codes": block_codes, "scales": block_scales, "zeros": block_zeros}


def look_up(codes: np.ndarray, scales: np.ndarray, encoding: str, columns: int) -> np.ndarray:
    """float32 [N, columns] of codes [N, nb, w] of a table and scales [N, nb]."""
    rows, blocks, width = codes.shape
    bits = ENCODINGS[encoding].bits
    each = unpack_bits(codes.reshape(rows, -1), bits, blocks * width * 8 // bits)
    weight = values(encoding)[each].reshape(rows, blocks, -1) * scales.astype(np.float32)[:, :, None]
    return np.ascontiguousarray(weight.reshape(rows, -1)[:, :columns])


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 [N, M] codes along the last axis, low bits first, each row padded with zeros to whole bytes."""
    per_byte = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    out = np.zeros((values.shape[0], padded.shape[1] // per_byte), np.uint8)
    for i in range(per_byte):
        out |= padded[:, i::per_byte] << np.uint8(i * bits)
    return out


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of ``pack_bits``: uint8 [N, count]."""
    per_byte = 8 // bits
    parts = [(packed >> np.uint8(i * bits)) & np.uint8(2**bits - 1) for i in range(per_byte)]
    return np.stack(parts, -1).reshape(packed.shape[0], -1)[:, :count]
