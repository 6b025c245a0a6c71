"""torchao's weights of float codes: Float8Tensor, MXTensor and NVFP4Tensor.

Source: torchao 0.18 (quantization/quantize_/workflows/float8, prototype/mx_formats). Of a weight [N, K]:

    Float8Tensor  qdata e4m3 or e5m2 [N, K], scale float32 for a block_size of [n, k]
    MXTensor      qdata e4m3 or e5m2 [N, K], or e2m1 packed; scale e8m0 (2^(e - 127)) per block_size columns
    NVFP4Tensor   qdata e2m1 packed; scale e4m3 per 16 columns, times per_tensor_scale, float32, where there is one

Packed: uint8 [N, K/2], the low nibble first. is_swizzled_scales: scales [N, G] stand in tiles of 128 x 4, padded with
zeros, each as 32 rows of 4 x 4: scale [32a + b, c] of a tile at [b, 4a + c].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporters.encodings import ENCODINGS, values
from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.compressed_activations import Rounding, spread_rows
from exporters.formats.compressed_floats import E2M1, E4M3, powers_of_two
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Scheme, Shape, ceil
from exporters.formats.torchao_activations import ROUNDINGS
from exporters.formats.torchao_header import PREFIX, Blocked, Described
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    import torch

E5M2 = "float8_e5m2"
_STORED = {E4M3: frozenset({"F8_E4M3"}), E5M2: frozenset({"F8_E5M2"}), E2M1: frozenset({"U8"})}
#: How scales are stored -> their dtypes in the file.
_SCALES = {"float": SCALES, "exponent": frozenset({"F8_E8M0"}), "float8": frozenset({"F8_E4M3"})}


@dataclass(frozen=True)
class FloatTensor(Blocked):
    """One weight of float codes.

    Attributes:
        encoding: of a code.
        scales: key of _SCALES.
        block: rows and columns with one scale.
        swizzled: scales stand in tiles.
        whole: per_tensor_scale is stored.
        rounding: how the layer's input is rounded.
    """

    kind: str
    encoding: str
    scales: str
    block: tuple[int, int]
    swizzled: bool = False
    whole: bool = False
    rounding: Rounding | None = None

    @property
    def _bits(self) -> int:
        return ENCODINGS[self.encoding].bits

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        grid = self._grid(shape)
        stored = (ceil(grid[0], 128) * 32, ceil(grid[1], 4) * 16) if self.swizzled else grid
        found: Layout = {
            f"{PREFIX}qdata": (_STORED[self.encoding], ((shape[0], shape[1] * self._bits // 8),)),
            f"{PREFIX}scale": (_SCALES[self.scales], (stored,)),
        }
        if self.whole:
            found[f"{PREFIX}per_tensor_scale"] = (frozenset({"F32"}), ((), (1,)))
        return found | (self.rounding.layout() if self.rounding is not None else {})

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        name = f"{module}.{PREFIX}scale"
        stored = read(name)
        scales = self._numbers(stored, name).reshape(-1)
        scales = _natural(scales, self._grid(shape)) if self.swizzled else scales.reshape(self._grid(shape))
        if self.whole:
            name = f"{module}.{PREFIX}per_tensor_scale"
            scales = scheme.positive_scales(read(name), name).reshape(()) * scales
        return QuantizedTensor(
            self._codes(read(f"{module}.{PREFIX}qdata"), f"{module}.{PREFIX}qdata"),
            spread_rows(scales, shape[0], self.block[0]),
            None,
            self._bits,
            self.block[1],
            shape,
            f"torchao {self.kind}",
            scheme.dtype_name(stored),
            self.encoding,
        )

    def _codes(self, stored: torch.Tensor, where: str) -> Array:
        import torch

        codes = np.ascontiguousarray(stored.view(torch.uint8).numpy())
        if self._bits == 8 and (~np.isfinite(values(self.encoding)))[codes].any():
            raise QuantizationError("holds NaN or infinity", where=where, way_out=AGAIN)
        return codes

    def _numbers(self, stored: torch.Tensor, where: str) -> Array:
        """float32 scales in stored order; the padding of tiles is 0."""
        if self.scales == "exponent":
            return powers_of_two(stored, where)
        if self.scales == "float":
            return scheme.positive_scales(stored, where)
        found: Array = stored.float().numpy()
        if not np.isfinite(found).all() or (found < 0).any():
            raise QuantizationError("holds a scale that is negative or NaN", where=where, way_out=AGAIN)
        return found


def _natural(stored: Array, grid: tuple[int, int]) -> Array:
    """Scales [N, G] of those that stand in tiles."""
    rows, columns = ceil(grid[0], 128), ceil(grid[1], 4)
    tiles = stored.reshape(rows, columns, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles.reshape(rows * 128, columns * 4)[: grid[0], : grid[1]])


def _size(entry: Described, *allowed: int) -> int:
    size = entry.data.get("block_size")
    if type(size) is not int or size not in allowed:
        entry.refuse(f"block_size is {size!r:.80}", f"Supported: {', '.join(map(str, allowed))}")
    return size


def _swizzled(entry: Described) -> bool:
    found = entry.data.get("is_swizzled_scales", False)
    if not isinstance(found, bool):
        entry.refuse(f"is_swizzled_scales is {found!r:.80}", AGAIN)
    return found


def _float8(entry: Described) -> FloatTensor:
    encoding = E5M2 if entry.dtype in _STORED[E5M2] else E4M3
    return FloatTensor(entry.kind, encoding, "float", entry.block(), rounding=ROUNDINGS[entry.kind](entry))


#: elem_dtype of an MXTensor -> its encoding
_ELEMENTS = {E4M3: E4M3, E5M2: E5M2, "float4_e2m1fn_x2": E2M1}


def _mx(entry: Described) -> FloatTensor:
    name = entry.value("elem_dtype")
    if not isinstance(name, str) or name not in _ELEMENTS:
        entry.refuse(f"elem_dtype is {name!r:.80}", f"Supported: {', '.join(_ELEMENTS)}")
    rounding = ROUNDINGS[entry.kind](entry)
    return FloatTensor(
        entry.kind, _ELEMENTS[name], "exponent", (1, _size(entry, 16, 32, 64)), _swizzled(entry), False, rounding
    )


def _nvfp4(entry: Described) -> FloatTensor:
    rounding = ROUNDINGS[entry.kind](entry)
    whole = "per_tensor_scale" in entry.parts
    return FloatTensor(entry.kind, E2M1, "float8", (1, _size(entry, 16)), _swizzled(entry), whole, rounding)


#: class of a tensor -> how its entry is read
FLOATS: Mapping[str, Callable[[Described], Scheme]] = {"Float8Tensor": _float8, "MXTensor": _mx, "NVFP4Tensor": _nvfp4}
