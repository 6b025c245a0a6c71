"""torchao checkpoints as transformers' TorchAoConfig saves them; those of float codes are in torchao_floats.py.

Source: torchao 0.18 (prototype/safetensors, quantization/quantize_/workflows/int8 and intx). The header of the
safetensors file names the class of every quantised tensor (torchao_header.py):

    Int8Tensor                qdata int8 [N, K], scale, zero point int8 or none, block_size [n, k]
    IntxUnpackedToInt8Tensor  the same with target_dtype intB: values of B bits, each in a byte

weight = (qdata - zero_point) * scale, with one scale for n x k weights: a group of a row, a row, or all of them. What
either says of the layer's input is read by torchao_activations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.compressed_activations import Rounding, spread_rows
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Scheme, Shape
from exporters.formats.torchao_activations import ROUNDINGS
from exporters.formats.torchao_floats import FLOATS
from exporters.formats.torchao_header import PREFIX, Blocked, Described, described
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "torchao"
_BYTES = frozenset({"I8"})
#: target_dtype of IntxUnpackedToInt8Tensor -> bits of a code; the two values of int1, -1 and 0, are two of int2's
INTX = {"int1": 2} | {f"int{bits}": bits for bits in range(2, 9)}
_INSTEAD = "Quantise with IntxWeightOnlyConfig(weight_dtype=torch.int4), which stores codes and whole zero points"
#: class -> why it is not read
REFUSED: Mapping[str, str] = {
    "Int4Tensor": "its zero points are floats in the weight's own unit, not codes",
    "Int4PlainInt32Tensor": "its codes are in the order of an XPU's or NPU's own conversion, which it does not name",
    "Int4PreshuffledTensor": "its codes are shuffled for the kernels of one GPU",
    "Int4TilePackedTo4dTensor": "its codes are in a GPU's tiles, its zero points floats in the weight's own unit",
}


@dataclass(frozen=True)
class TorchAo(Blocked):
    """One weight of integers.

    Attributes:
        bits: of a code.
        block: rows and columns with one scale.
        zero_points: whether they are stored.
        rounding: how the layer's input is rounded.
    """

    kind: str
    bits: int
    block: tuple[int, int]
    zero_points: bool
    rounding: Rounding | None = None

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        grid = self._grid(shape)
        grids = (grid, grid[:1]) if grid[1] == 1 else (grid,)
        found: Layout = {f"{PREFIX}qdata": (_BYTES, (shape,)), f"{PREFIX}scale": (SCALES, grids)}
        if self.zero_points:
            found[f"{PREFIX}zero_point"] = (_BYTES, grids)
        return found | (self.rounding.layout() if self.rounding is not None else {})

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        name = f"{module}.{PREFIX}scale"
        stored = read(name)
        zeros = None
        if self.zero_points:
            points = self._unsigned(read, f"{module}.{PREFIX}zero_point")
            zeros = None if (points == 1 << (self.bits - 1)).all() else self._spread(points, shape)
        return QuantizedTensor.from_codes(
            self._unsigned(read, f"{module}.{PREFIX}qdata"),
            self._spread(scheme.positive_scales(stored, name), shape),
            zeros,
            bits=self.bits,
            source=f"torchao {self.kind}",
            scale_dtype=scheme.dtype_name(stored),
            group=self.block[1],
        )

    def _unsigned(self, read: Read, name: str) -> Array:
        return scheme.unsigned(read(name).numpy(), self.bits, name)

    def _spread(self, values: Array, shape: Shape) -> Array:
        return spread_rows(values.reshape(self._grid(shape)), shape[0], self.block[0])


def _int8(entry: Described) -> Scheme:
    return TorchAo(entry.kind, 8, entry.block(), "zero_point" in entry.parts, ROUNDINGS[entry.kind](entry))


def _intx(entry: Described) -> Scheme:
    name = entry.value("target_dtype")
    if not isinstance(name, str) or name not in INTX:
        entry.refuse(f"target_dtype is {name!r:.80}", f"Known: {', '.join(INTX)}")
    return TorchAo(entry.kind, INTX[name], entry.block(), True, ROUNDINGS[entry.kind](entry))


#: class of a tensor -> how its entry is read
KINDS: Mapping[str, Callable[[Described], Scheme]] = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, **FLOATS}


def _scheme(entry: Described) -> Scheme:
    if entry.kind in REFUSED:
        entry.refuse(f"holds a {entry.kind}: {REFUSED[entry.kind]}", _INSTEAD)
    if entry.kind not in KINDS:
        entry.refuse(f"holds a {entry.kind:.80}, which is not known", f"Known: {', '.join(KINDS)}")
    if "act_pre_scale" in entry.parts:
        entry.refuse(
            "holds act_pre_scale, by which the input is multiplied (AWQ, SmoothQuant)",
            "Fold it into the layer in front, or quantise without it",
        )
    return KINDS[entry.kind](entry)


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module with a ``_weight_qdata``, from the header of its file."""
    result: dict[str, Scheme] = {}
    for name in modules:
        qdata = f"{name}.{PREFIX}qdata"
        if qdata not in stored.tensors:
            continue
        where = f"{stored.tensors[qdata].file.name}: metadata of {name}.weight"
        text = stored.metadata(qdata).get(f"{name}.weight")
        if text is None:
            raise QuantizationError(
                "is missing", where=where, way_out=f"Save the checkpoint with torchao 0.18. {AGAIN}"
            )
        result[name] = _scheme(described(text, stored.tensors[qdata].dtype, where))
    return result
