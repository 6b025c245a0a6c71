"""Decoders for the weight-only integer formats of compressed-tensors: stored tensors -> QuantizedTensor.

A decoder only moves bits; it never rounds, so codes, scales and zero points are those of the checkpoint.

compressed-tensors (github.com/vllm-project/compressed-tensors 0.20, compressors/pack_quantized and naive_quantized)
stores signed integers q in [-2**(bits-1), 2**(bits-1)); the code is q + 2**(bits-1), likewise for zero points, so
(q - z) = (code - zero_point). `pack-quantized` holds q + 2**(bits-1) in int32 words, element i of a row at bit i*bits,
low bits first: little-endian, those words are the canonical bytes with padding at each row's end. Its zero points are
packed the same way along N. `int-quantized` holds q as int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.quantized import QuantizedTensor
from exporters.safetensors_header import TensorInfo

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


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
    codes = np.ascontiguousarray(padded[:, :width])
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


def layout(scheme: WeightScheme, shape: tuple[int, int]) -> Layout:
    """The tensors that a weight of `shape` is stored in: local name -> (safetensors dtypes, allowed shapes)."""
    return FORMATS[scheme.format].layout(scheme, shape)


def check_group(module: str, scheme: WeightScheme, shape: tuple[int, int]) -> None:
    """Refuse a group size that does not divide K."""
    if scheme.group is not None and shape[1] % scheme.group:
        raise QuantizationError(
            f"group_size {scheme.group} does not divide K = {shape[1]}",
            where=f"{module}.weight",
            way_out="Quantise with a group size that divides it; padding would change the weights",
        )


def leftovers(module: str, scheme: WeightScheme, stored: Mapping[str, TensorInfo], read: Read) -> Iterator[str]:
    """Names of stored tensors of `module` that say nothing, so that they can be passed over; refuses the rest.

    Older writers keep all-zero zero points for symmetric weights. g_idx (act-order) reorders K and is not carried
    over yet.
    """
    name = f"{module}.weight_g_idx"
    if name in stored:
        index = read(name)
        groups = 1 if scheme.group is None else stored[f"{module}.weight_scale"].shape[-1]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= groups):
            raise QuantizationError(
                f"holds group {int(index.max())} (lowest {int(index.min())}), there are {groups}",
                where=name,
                way_out="Quantise the checkpoint again",
            )
        raise QuantizationError(
            "act-order (g_idx) is not supported", where=name, way_out="Quantise with actorder null or weight"
        )
    name = f"{module}.weight_zero_point"
    if scheme.symmetric and name in stored:
        if stored[name].dtype != "I8" or read(name).any():
            raise QuantizationError(
                "holds zero points, but the scheme says symmetric",
                where=name,
                way_out="State symmetric: false, or drop the tensor",
            )
        yield name
