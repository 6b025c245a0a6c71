"""Our own export of quantisation-aware training: float weights that lie on a grid, with the grid beside them.

A training loop with fake quantisation writes its checkpoint as it is and adds the scales that it trained with:

    config.json   "quantization_config": {"quant_method": "edge-qat", "version": 1, "bits": 4, "group_size": 32,
                  "symmetric": true, "modules": {"lm_head": {"bits": 8, "group_size": -1}}}
    MODULE.weight             float [N, K]: fake_quantize(w), in float32, float16 or bfloat16
    MODULE.weight_scale       float [N, ceil(K/group_size)], group_size -1 for one scale per row
    MODULE.weight_zero_point  uint8 of the scales' shape, unless symmetric, which means 2**(bits-1)

Every module with a weight_scale is quantised; "modules" gives single ones their own numbers. The code of a weight is
round(weight / scale + zero_point), and (code - zero_point) * scale, a float32 product rounded to the type that the
weight is stored in, must be that weight: one that is off the grid is refused, never rounded onto it. So is one that a
second code gives as well, which happens to 8-bit codes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.scheme import SCALES, Array, Layout, Read, Scheme, Shape, ceil
from exporters.quantized import FIELDS, QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "edge-qat"
VERSION = 1
KEYS = ("bits", "group_size", "symmetric")


@dataclass(frozen=True)
class Qat(Scheme):
    """One weight; ``group`` is None for one scale per row."""

    bits: int
    group: int | None
    symmetric: bool

    def _grid(self, shape: Shape) -> Shape:
        return shape[0], 1 if self.group is None else ceil(shape[1], self.group)

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        grid = self._grid(shape)
        found: Layout = {"weight": (SCALES, (shape,)), "weight_scale": (SCALES, (grid,))}
        if not self.symmetric:
            found["weight_zero_point"] = (frozenset({"U8"}), (grid,))
        return found

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        import torch

        group = self.group or shape[1]
        stored, name = read(f"{module}.weight_scale"), f"{module}.weight_scale"
        scales = np.ascontiguousarray(scheme.positive_scales(stored, name))
        zeros = None if self.symmetric else np.ascontiguousarray(read(f"{module}.weight_zero_point").numpy())
        weight = read(f"{module}.weight")

        def spread(values: Array) -> Array:
            return np.repeat(values.astype(np.float64), group, 1)[:, : shape[1]]

        points = float(1 << (self.bits - 1)) if zeros is None else spread(zeros)
        exact, steps = weight.double().numpy(), spread(scales)
        nearest = np.rint(exact / steps + points)
        # A weight that was rounded to a short type may be nearer to the code beside its own.
        codes, matches = np.zeros_like(nearest), np.zeros(shape, np.uint8)
        for candidate in (nearest - 1, nearest + 1, nearest):
            given = torch.from_numpy((candidate - points) * steps).float().to(weight.dtype)
            fits = (given == weight).numpy() & (candidate >= 0) & (candidate < 1 << self.bits)
            codes, matches = np.where(fits, candidate, codes), matches + fits
        if (matches != 1).any():
            row, column = (int(index[0]) for index in np.nonzero(matches != 1))
            several = "off the grid" if (matches == 0).any() else f"those of two codes in {weight.dtype}"
            raise QuantizationError(
                f"{int((matches != 1).sum())} of {matches.size} weights are {several}, the first one [{row}, {column}]:"
                f" {exact[row, column]:.6g} is {exact[row, column] / steps[row, column]:.4f} steps",
                where=f"{module}.weight",
                way_out="Export the weights after fake quantisation, in float32, with the scales and zero points of it",
            )
        return QuantizedTensor.from_codes(
            codes.astype(np.uint8),
            scales,
            zeros,
            bits=self.bits,
            source=METHOD,
            scale_dtype=scheme.dtype_name(stored),
            group=group,
        )


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has a ``weight_scale``."""
    if config.get("version") != VERSION:
        scheme.refuse(f"version is {config.get('version')!r:.80}", ".version", f"Known: {VERSION}")
    own = config.get("modules") or {}
    if not isinstance(own, dict) or not all(isinstance(values, dict) for values in own.values()):
        scheme.refuse("is not an object of module names", ".modules", "Give names and their numbers")
    for name, values in own.items():
        if name not in modules or not set(values) <= set(KEYS):
            scheme.refuse(
                f"{name!r:.200} is no module, or has other keys than {', '.join(KEYS)}", ".modules", "Correct it"
            )
    result: dict[str, Scheme] = {}
    for name in modules:
        if f"{name}.weight_scale" not in stored.tensors:
            continue
        values, at = {**config, **own.get(name, {})}, f".modules.{name}" if name in own else ""
        bits, group = scheme.whole(values, "bits", FIELDS, at), scheme.whole(values, "group_size", None, at)
        result[name] = Qat(bits, None if group == -1 else group, scheme.flag(values, "symmetric", at))
    return result
