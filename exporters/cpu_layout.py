"""Weights in the order in which the kernels of kernels/cpu read them, and back again, bit for bit.

Sixteen rows of a matrix (output features) stand side by side as a panel, eight output channels of a convolution.
What is missing from the last panel is filled with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Rows of a matrix in a panel; kPanel in kernels/cpu/edge_kernels.h.
PANEL = 16
#: Output channels of a convolution in a panel; kChannelPanel there.
CHANNEL_PANEL = 8


@dataclass(frozen=True)
class PackedWeight:
    """A block-quantised matrix.

    Attributes:
        codes: uint32 [panels, K/(32/bits), 16]; byte i of a word holds columns i, i+4, i+8 ... low bits first.
        scales: float32 [panels, blocks, 16].
        zeros: uint8 [panels, blocks, 16], or None for 2^(bits-1).
    """

    codes: Array
    scales: Array
    zeros: Array | None


def _panels(rows: Array, size: int) -> Array:
    """[N, ...] -> [ceil(N/size), ..., size], zeros past N."""
    missing = -len(rows) % size
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    return np.ascontiguousarray(np.moveaxis(padded.reshape(-1, size, *rows.shape[1:]), 1, -1))


def _rows(panels: Array, count: int) -> Array:
    """The inverse of ``_panels``."""
    return np.moveaxis(panels, -1, 1).reshape(-1, *panels.shape[1:-1])[:count]


def _unpack(packed: Array, bits: int) -> Array:
    """Codes uint8 [..., P] -> [..., P*8/bits], low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)


def _pack(codes: Array, bits: int) -> Array:
    """The inverse of ``_unpack``; the last byte is filled with zeros."""
    each = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    parts = padded.reshape(*codes.shape[:-1], -1, each) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts, -1).astype(np.uint8)


def pack_quantized(codes: Array, scales: Array, zeros: Array | None, bits: int) -> PackedWeight:
    """Codes uint8 [N, blocks, G*bits/8], scales [N, blocks], zeros uint8 [N, ceil(blocks*bits/8)] or None, as in
    ``edge::quantized_linear``; G is a multiple of 32/bits."""
    rows, blocks = scales.shape
    columns = _unpack(codes.reshape(rows, -1), bits)
    # [rows, words, column of the byte, byte] -> bits of a byte together, then bytes of a word.
    bytes_ = columns.reshape(rows, -1, 8 // bits, 4).swapaxes(-1, -2)
    words = _pack(bytes_, bits).reshape(rows, -1).view("<u4")
    points = None if zeros is None else _panels(_unpack(zeros, bits)[:, :blocks], PANEL)
    return PackedWeight(_panels(words, PANEL), _panels(scales.astype(np.float32), PANEL), points)


def unpack_quantized(packed: PackedWeight, bits: int, rows: int) -> tuple[Array, Array, Array | None]:
    """The inverse of ``pack_quantized``: codes, scales, zeros of a matrix of ``rows`` rows."""
    words = np.ascontiguousarray(_rows(packed.codes, rows)).astype("<u4", copy=False)
    bytes_ = words.view(np.uint8).reshape(rows, -1, 4, 1)
    columns = _unpack(bytes_, bits).swapaxes(-1, -2).reshape(rows, -1)
    scales = _rows(packed.scales, rows)
    zeros = None if packed.zeros is None else _pack(_rows(packed.zeros, rows), bits)
    return _pack(columns, bits).reshape(rows, scales.shape[1], -1), scales, zeros


def pack_linear(weight: Array) -> Array:
    """Float weights [N, K] -> [panels, K, 16]."""
    return _panels(weight, PANEL)


def unpack_linear(packed: Array, rows: int) -> Array:
    """The inverse of ``pack_linear``."""
    return _rows(packed, rows)


def pack_conv(weight: Array, groups: int = 1) -> Array:
    """[O, I/groups, *kernel] -> float32 [groups, panels, I/groups, taps, 8]."""
    grouped = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
    return np.stack([_panels(group, CHANNEL_PANEL) for group in grouped]).astype(np.float32)


def unpack_conv(packed: Array, channels: int, kernel: tuple[int, ...]) -> Array:
    """The inverse of ``pack_conv`` for ``channels`` output channels."""
    rows = [_rows(group, channels // len(packed)) for group in packed]
    return np.concatenate(rows).reshape(channels, packed.shape[2], *kernel)


def pack_conv_transpose(weight: Array, groups: int = 1) -> Array:
    """[I, O/groups, *kernel], as transposed convolutions hold it -> the layout of ``pack_conv``."""
    split = weight.reshape(groups, -1, *weight.shape[1:])
    return pack_conv(np.concatenate(list(split.swapaxes(1, 2))), groups)


def unpack_conv_transpose(packed: Array, channels: int, kernel: tuple[int, ...]) -> Array:
    """The inverse of ``pack_conv_transpose`` for ``channels`` output channels."""
    groups = len(packed)
    split = unpack_conv(packed, channels, kernel).reshape(groups, channels // groups, packed.shape[2], *kernel)
    return np.concatenate(list(split.swapaxes(1, 2)))
