"""compressed-tensors' weights of float codes: fp8 (float-quantized, mxfp8-quantized) and fp4 (nvfp4, mxfp4).

Source: compressed-tensors 0.20 (compressors/naive_quantized, nvfp4, mxfp4, mxfp8, mx_utils). ``weight`` is
float8_e4m3fn [N, K]; ``weight_packed`` uint8 [N, K/2] holds two e2m1 codes a byte, the low nibble first.
``weight_scale`` is a float for the tensor, a row, a group along K or a block of both axes; or float8_e4m3fn per 16
columns, divided by ``weight_global_scale``, a float32 division as the library does it; or uint8 exponents per 32
columns, 2^(e - 127), of which 255 is not a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.compressed_activations import Rounded, Rounding, spread_rows
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Shape, ceil, check_group
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    import torch

    from exporters.checkpoint import Checkpoint

E4M3, E2M1 = "float8_e4m3fn", "float4_e2m1fn"
_FP8 = frozenset({"F8_E4M3"})
_ONE = ((1,), (), (1, 1))


@dataclass(frozen=True)
class FloatScheme(Rounded):
    """What the float formats have in common.

    Attributes:
        source: the format's name.
        packed: two e2m1 codes a byte, else e4m3.
        scales: "float", "float8" below a global scale, or "exponent".
        block: rows and columns with one scale; rows 0 for all of them, columns None for all of a row.
        rounding: how the layer's input is rounded.
    """

    source: str
    packed: bool
    scales: str
    block: tuple[int, int | None]
    rounding: Rounding | None = None

    def check(self, module: str, shape: Shape) -> None:
        """Refuses columns that do not fill their groups; only blocks of both axes may end in part of one."""
        rows, columns = self.block
        if self.packed and shape[1] % 2:
            raise QuantizationError(
                f"K = {shape[1]} is odd, two codes fill a byte", where=f"{module}.weight_packed", way_out=AGAIN
            )
        if rows == 1 and columns is not None:
            check_group(module, columns, shape[1])
        super().check(module, shape)

    def _grid(self, shape: Shape) -> tuple[int, int]:
        rows, columns = self.block
        return ceil(shape[0], rows or shape[0]), ceil(shape[1], columns or shape[1])

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        grid = self._grid(shape)
        shapes = {(1, 1): (grid, (1,), ()), (shape[0], 1): (grid, (shape[0],))}.get(grid, (grid,))
        dtypes = {"float": SCALES, "float8": _FP8, "exponent": frozenset({"U8", "F8_E8M0"})}[self.scales]
        found: Layout = {"weight_scale": (dtypes, shapes)}
        if self.packed:
            found["weight_packed"] = (frozenset({"U8"}), ((shape[0], shape[1] // 2),))
        else:
            found["weight"] = (_FP8, (shape,))
        if self.scales == "float8":
            found["weight_global_scale"] = (frozenset({"F32"}), _ONE)
        return found | (self.rounding.layout() if self.rounding is not None else {})

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """See Scheme."""
        name = f"{module}.weight_zero_point"
        if name in stored.tensors:
            if stored.tensor(name).float().any():
                raise QuantizationError("float weights with zero points", where=name, way_out=AGAIN)
            yield name
        yield from super().leftovers(module, stored)

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        scales, kind = self._scales(read, module, shape)
        group = min(self.block[1] or shape[1], shape[1])
        if self.packed:
            codes = np.ascontiguousarray(read(f"{module}.weight_packed").numpy())
            return QuantizedTensor(codes, scales, None, 4, group, shape, self.source, kind, E2M1)
        codes = fp8_codes(read(f"{module}.weight"), f"{module}.weight")
        return QuantizedTensor(codes, scales, None, 8, group, shape, self.source, kind, E4M3)

    def _scales(self, read: Read, module: str, shape: Shape) -> tuple[Array, str]:
        """float32 [N, groups], and the stored type."""
        name = f"{module}.weight_scale"
        stored = read(name)
        if self.scales == "exponent":
            found = powers_of_two(stored, name)
        elif self.scales == "float8":
            whole = f"{module}.weight_global_scale"
            found = below_global(stored, name, scheme.positive_scales(read(whole), whole).reshape(1, 1))
        else:
            found = scheme.positive_scales(stored, name)
        rows = self.block[0] or shape[0]
        return spread_rows(found.reshape(self._grid(shape)), shape[0], rows), scheme.dtype_name(stored)


def fp8_codes(stored: torch.Tensor, where: str) -> Array:
    """The codes of e4m3 numbers, uint8 like ``stored``; raises QuantizationError for NaN. There is no infinity."""
    import torch

    codes = stored.view(torch.uint8).numpy()
    if ((codes & 0x7F) == 0x7F).any():
        raise QuantizationError("holds NaN", where=where, way_out=AGAIN)
    return np.ascontiguousarray(codes)


def powers_of_two(stored: torch.Tensor, where: str) -> Array:
    """float32 scales of uint8 exponents of bias 127; raises QuantizationError for 255, which is NaN."""
    import torch

    exponents = stored.view(torch.uint8).numpy()
    if (exponents == 255).any():
        raise QuantizationError("holds the exponent 255, which is NaN", where=where, way_out=AGAIN)
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def below_global(stored: torch.Tensor, where: str, whole: Array) -> Array:
    """float32 quotients of float8 scales and the global one; a group without a weight may have the scale 0."""
    scales = stored.float().numpy()
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise QuantizationError("holds a scale that is negative or NaN", where=where, way_out=AGAIN)
    with np.errstate(over="ignore"):
        found = scales / whole
    if not np.isfinite(found).all():
        raise QuantizationError("scales overflow when divided by weight_global_scale", where=where, way_out=AGAIN)
    return found
