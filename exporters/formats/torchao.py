"""torchao checkpoints as transformers' TorchAoConfig saves them: int8 weights, and integers of 2 to 8 bits in groups.

Source: torchao 0.18 (prototype/safetensors, quantization/quantize_/workflows/int8 and intx). The header of the
safetensors file names the class of every quantised tensor: metadata["MODULE.weight"] is JSON {"_type", "_data"}; its
parts are stored as MODULE._weight_qdata, _weight_scale and _weight_zero_point.

    Int8Tensor                qdata int8 [N, K], scale [N, K/b], zero point int8 or none, block_size [1, b]
    IntxUnpackedToInt8Tensor  the same with target_dtype intB: values of B bits, each in a byte

weight = (qdata - zero_point) * scale. Int4Tensor and its packings are refused: their zero points are floats in the
weight's own unit, not codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Scheme, Shape, ceil
from exporters.quantized import QuantizedTensor
from exporters.strict_json import parse_json

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "torchao"
_BYTES = frozenset({"I8"})
#: target_dtype of IntxUnpackedToInt8Tensor -> bits
INTX = {f"int{bits}": bits for bits in range(2, 9)}
SUPPORTED = "Quantise with Int8WeightOnlyConfig, or IntxWeightOnlyConfig for fewer bits"


@dataclass(frozen=True)
class TorchAo(Scheme):
    """One weight, with ``group`` columns to a scale; ``zero_points`` says whether they are stored."""

    kind: str
    bits: int
    group: int
    zero_points: bool

    def check(self, module: str, shape: Shape) -> None:
        """Refuse a block that does not divide K."""
        if shape[1] % self.group:
            raise QuantizationError(
                f"block_size [1, {self.group}] does not divide K = {shape[1]}",
                where=f"{module}.weight",
                way_out="Take the header and the weights from one checkpoint",
            )

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        rows, groups = shape[0], ceil(shape[1], self.group)
        grid = ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)
        found: Layout = {"_weight_qdata": (_BYTES, (shape,)), "_weight_scale": (SCALES, grid)}
        if self.zero_points:
            found["_weight_zero_point"] = (_BYTES, grid)
        return found

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        grid = (shape[0], ceil(shape[1], self.group))
        name = f"{module}._weight_scale"
        stored = read(name)
        zeros = None
        if self.zero_points:
            points = self._unsigned(read, f"{module}._weight_zero_point").reshape(grid)
            zeros = None if (points == 1 << (self.bits - 1)).all() else np.ascontiguousarray(points)
        return QuantizedTensor.from_codes(
            self._unsigned(read, f"{module}._weight_qdata"),
            np.ascontiguousarray(scheme.positive_scales(stored, name).reshape(grid)),
            zeros,
            bits=self.bits,
            source=f"torchao {self.kind}",
            scale_dtype=scheme.dtype_name(stored),
            group=self.group,
        )

    def _unsigned(self, read: Read, name: str) -> Array:
        return scheme.unsigned(read(name).numpy(), self.bits, name)


def _described(text: str, where: str) -> tuple[str, Mapping[str, Any], list[str]]:
    """Class, attributes and parts of a quantised tensor, as the header describes it."""
    value = parse_json(text.encode(), where)
    kind, data = (value.get("_type"), value.get("_data")) if isinstance(value, dict) else (None, None)
    parts = value.get("_tensor_data_names") if isinstance(value, dict) else None
    if not isinstance(kind, str) or not isinstance(data, dict) or not isinstance(parts, list):
        raise QuantizationError(f"is {text!r:.100}", where=where, way_out="Save the checkpoint again with torchao 0.18")
    return kind, data, [part for part in parts if isinstance(part, str)]


def _scheme(text: str, where: str) -> TorchAo:
    kind, data, parts = _described(text, where)
    if kind == "Int8Tensor":
        bits, activations = 8, data.get("act_quant_kwargs")
    elif kind == "IntxUnpackedToInt8Tensor":
        target = data.get("target_dtype")
        name = target.get("_data") if isinstance(target, dict) else None
        if name not in INTX:
            raise QuantizationError(f"target_dtype is {name!r:.80}", where=where, way_out=f"Known: {', '.join(INTX)}")
        bits, activations = INTX[name], data.get("activation_quantization")
    else:
        reason = "zero points are floats in the weight's own unit" if kind.startswith("Int4") else "it is not known"
        raise QuantizationError(f"holds a {kind:.80}: {reason}", where=where, way_out=SUPPORTED)
    if activations is not None:
        raise QuantizationError("activations are quantised", where=where, way_out=SUPPORTED)
    block = data.get("block_size")
    whole = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not whole or block[0] != 1:
        raise QuantizationError(f"block_size is {block!r:.80}", where=where, way_out="Quantise per row or per group")
    return TorchAo(kind, bits, block[1], "zero_point" in parts)


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module with a ``_weight_qdata``, from the header of its file."""
    result: dict[str, Scheme] = {}
    for name in modules:
        qdata = f"{name}._weight_qdata"
        if qdata not in stored.tensors:
            continue
        where = f"{stored.tensors[qdata].file.name}: metadata of {name}.weight"
        text = stored.metadata(qdata).get(f"{name}.weight")
        if text is None:
            raise QuantizationError(
                "is missing", where=where, way_out=f"Save the checkpoint with torchao 0.18. {AGAIN}"
            )
        result[name] = _scheme(text, where)
    return result
