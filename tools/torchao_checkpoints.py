"""Linear layers as torchao's flattening for safetensors stores them, for tools/make_checkpoints.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from tools.float_checkpoints import Made, Shape, fp4, fp8, fp8_channel, stored

if TYPE_CHECKING:
    from tools.make_checkpoints import Grid

GROUP = 32


def signed(values: np.ndarray, bits: int) -> torch.Tensor:
    """int8 of unsigned codes: 2**(bits-1) less."""
    return torch.from_numpy((values.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def integers(grid: Grid, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a weight: codes and zero points as signed bytes."""
    return {
        "_weight_qdata": signed(grid.codes, bits),
        "_weight_scale": torch.from_numpy(grid.scales.astype(np.float32)),
        "_weight_zero_point": signed(grid.zeros, bits),
    }


def header(bits: int, columns: int) -> str:
    """What the header of the file says of a weight of integers."""
    if bits == 8:
        data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, columns]}
        return _entry("Int8Tensor", data, "zero_point")
    data = {"target_dtype": _dtype(f"int{bits}"), "block_size": [1, GROUP], "activation_quantization": None}
    return _entry("IntxUnpackedToInt8Tensor", data, "zero_point")


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _entry(kind: str, data: Mapping[str, Any], *parts: str) -> str:
    names = ["qdata", "scale", *parts]
    return json.dumps({"_type": kind, "_data": {**data, "dtype": _dtype("float32")}, "_tensor_data_names": names})


def _swizzled(scales: np.ndarray) -> np.ndarray:
    """Scales in tiles of 128 x 4, element by element."""
    rows, columns = scales.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    found = np.zeros((high * wide, 32, 16), scales.dtype)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * wide + column // 4
            found[tile, row % 32, row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return found.reshape(high * 32, wide * 16)


def _fp8(random: np.random.Generator, shape: Shape) -> Made:
    """Float8Tensor, one scale a row."""
    parts, weight = fp8_channel(random, shape)
    return {"_weight_qdata": parts["weight"], "_weight_scale": parts["weight_scale"]}, weight


def _mxfp8(random: np.random.Generator, shape: Shape) -> Made:
    """MXTensor of e4m3, scales in tiles."""
    codes, exponents = fp8(random, shape), random.integers(112, 117, (shape[0], shape[1] // 32), np.uint8)
    weight = codes.astype(np.float32) * np.exp2(exponents.astype(np.float32) - 127).repeat(32, 1)
    scales = torch.from_numpy(_swizzled(exponents)).view(torch.float8_e8m0fnu)
    return {"_weight_qdata": stored(codes), "_weight_scale": scales}, weight


def _nvfp4(random: np.random.Generator, shape: Shape) -> Made:
    """NVFP4Tensor, scales in tiles and below one of the tensor."""
    packed, codes = fp4(random, shape)
    scales = random.uniform(10, 400, (shape[0], shape[1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(1.37e-4)
    parts = {
        "_weight_qdata": packed,
        "_weight_scale": stored(_swizzled(scales)),
        "_weight_per_tensor_scale": torch.tensor(whole),
    }
    return parts, codes * (whole * scales.astype(np.float32)).repeat(16, 1)


_IN_TILES = {"is_swizzled_scales": True}
#: kind -> (random numbers and shape -> tensors and weight, K -> what the header says of a weight)
FLOATS: Mapping[str, tuple[Callable[[np.random.Generator, Shape], Made], Callable[[int], str]]] = {
    "fp8": (_fp8, lambda columns: _entry("Float8Tensor", {"block_size": [1, columns], "act_quant_kwargs": None})),
    "mxfp8": (
        _mxfp8,
        lambda _: _entry("MXTensor", {"elem_dtype": _dtype("float8_e4m3fn"), "block_size": 32, **_IN_TILES}),
    ),
    "nvfp4": (_nvfp4, lambda _: _entry("NVFP4Tensor", {"block_size": 16, **_IN_TILES}, "per_tensor_scale")),
}
