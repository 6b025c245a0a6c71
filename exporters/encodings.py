"""What a code of a quantised weight stands for, where it is not an integer: one table of values per encoding.

fp8 and fp4 are those of the OCP 8-bit floating point and microscaling (MX) specifications 1.0; nf4 is the 4-bit
NormalFloat of QLoRA (Dettmers et al. 2023, appendix E).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

#: Codes of integers: value = code - zero point.
INTEGER = "integer"

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """``bits`` of a code, and the numpy type whose bit patterns the codes are (None: a table of its own)."""

    bits: int
    dtype: Any


#: encoding -> what its codes are
ENCODINGS: Mapping[str, Encoding] = {
    "float8_e4m3fn": Encoding(8, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": Encoding(8, ml_dtypes.float8_e5m2),
    "float4_e2m1fn": Encoding(4, ml_dtypes.float4_e2m1fn),
    "nf4": Encoding(4, None),
}


@cache
def values(encoding: str) -> np.ndarray[Any, Any]:
    """float32 [2**bits]: the value of every code. NaN for the codes of float8 that are not numbers."""
    entry = ENCODINGS[encoding]
    if entry.dtype is None:
        table = np.array(_NF4, np.float32)
    else:
        table = np.arange(1 << entry.bits, dtype=np.uint8).view(entry.dtype).astype(np.float32)
    table.setflags(write=False)
    return table


@cache
def as_integers(encoding: str) -> np.ndarray[Any, Any]:
    """uint8 [2**bits]: 128 plus twice each value of an encoding whose values times two are whole numbers below 128.

    With half the scale an 8-bit integer code of zero point 128 is then the same weight.
    """
    doubled = 2 * values(encoding)
    codes = (doubled + 128).astype(np.uint8)
    if not np.array_equal(codes.astype(np.float32) - 128, doubled):
        raise ValueError(f"{encoding} has values that no integers stand for")
    codes.setflags(write=False)
    return codes
