"""Linear layers of float codes as their formats store them, for tools/make_checkpoints.py: (tensors, weight [N, K])."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import torch

Made = tuple[dict[str, torch.Tensor], np.ndarray]
Shape = tuple[int, int]
#: Rows and columns of a block of fine-grained fp8.
BLOCK = 32
NF4_BLOCK = 32


def fp8(random: np.random.Generator, shape: Shape) -> np.ndarray:
    """Random e4m3 numbers of every size."""
    codes = random.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(ml_dtypes.float8_e4m3fn)


def stored(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(torch.float8_e4m3fn)


def fp8_channel(random: np.random.Generator, shape: Shape) -> Made:
    """float-quantized, one scale a row."""
    codes, scales = fp8(random, shape), random.uniform(1e-4, 1e-3, (shape[0], 1)).astype(np.float32)
    return {"weight": stored(codes), "weight_scale": torch.from_numpy(scales)}, codes.astype(np.float32) * scales


def fp8_blocks(random: np.random.Generator, shape: Shape) -> Made:
    """float-quantized, one scale a block of both axes."""
    codes = fp8(random, shape)
    scales = random.uniform(1e-4, 1e-3, [-(-size // BLOCK) for size in shape]).astype(np.float32)
    wide = scales.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]
    return {"weight": stored(codes), "weight_scale": torch.from_numpy(scales)}, codes.astype(np.float32) * wide


def fp4(random: np.random.Generator, shape: Shape) -> tuple[torch.Tensor, np.ndarray]:
    """Packed random e2m1 codes, the low nibble first, and their values."""
    codes = random.integers(0, 16, shape, np.uint8)
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), codes.view(ml_dtypes.float4_e2m1fn).astype(
        np.float32
    )


def nvfp4(random: np.random.Generator, shape: Shape) -> Made:
    """nvfp4-pack-quantized."""
    packed, codes = fp4(random, shape)
    scales = random.uniform(10, 400, (shape[0], shape[1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(7531.25)
    wide = (scales.astype(np.float32) / whole).repeat(16, 1)
    parts = {"weight_packed": packed, "weight_scale": stored(scales), "weight_global_scale": torch.tensor([whole])}
    return parts, codes * wide


def mxfp4(random: np.random.Generator, shape: Shape) -> Made:
    """mxfp4-pack-quantized."""
    packed, codes = fp4(random, shape)
    exponents = random.integers(119, 124, (shape[0], shape[1] // 32), np.uint8)
    wide = np.exp2(exponents.astype(np.float32) - 127).repeat(32, 1)
    return {"weight_packed": packed, "weight_scale": torch.from_numpy(exponents)}, codes * wide


def nf4(random: np.random.Generator, shape: Shape) -> Made:
    """bitsandbytes nf4 without nested scales, the high nibble first."""
    from exporters.encodings import values

    codes = random.integers(0, 16, shape[0] * shape[1], np.uint8)
    scales = random.uniform(0.05, 0.3, -(-len(codes) // NF4_BLOCK)).astype(np.float32)
    state = dict(quant_type="nf4", blocksize=NF4_BLOCK, dtype="float32", shape=list(shape))
    parts = {
        "weight": codes[0::2, None] << 4 | codes[1::2, None],
        "weight.absmax": scales,
        "weight.quant_map": values("nf4").copy(),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
    }
    weight = values("nf4")[codes] * scales.repeat(NF4_BLOCK)[: len(codes)]
    return {name: torch.from_numpy(part) for name, part in parts.items()}, weight.reshape(shape)
