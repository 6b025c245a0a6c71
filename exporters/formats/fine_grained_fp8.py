"""Fine-grained fp8 (quant_method "fp8", as DeepSeek and Qwen publish): blocks of e4m3 weights with a scale each.

Source: transformers 5.23 (integrations/finegrained_fp8, utils/quantization_config.FineGrainedFP8Config). ``weight``
float8_e4m3fn [N, K]; ``weight_scale_inv`` [ceil(N/128), ceil(K/128)], which multiplies despite its name: float32, or
uint8 exponents of bias 127 (scale_fmt "ue8m0"); one number without blocks. Inputs are rounded to fp8 as they come, per
token and 128 columns (activation_scheme "dynamic"), or with ``activation_scale`` ("static").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.activations import Activation
from exporters.errors import QuantizationError
from exporters.formats import matching, scheme
from exporters.formats.compressed_activations import spread_rows
from exporters.formats.compressed_floats import E4M3, fp8_codes, powers_of_two
from exporters.formats.scheme import SCALES, Layout, Read, Scheme, Shape, ceil
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "fp8"
_SCHEMES = ("dynamic", "static")


@dataclass(frozen=True)
class FineGrained(Scheme):
    """One linear layer; ``block``: rows and columns with one scale, None for the whole weight."""

    block: tuple[int, int] | None
    exponents: bool
    static: bool

    def check(self, module: str, shape: Shape) -> None:
        """Refuses inputs whose last group would be short, for which the library has no rule."""
        if self.block is not None and not self.static and shape[1] % self.block[1] and shape[1] > self.block[1]:
            raise QuantizationError(
                f"its input is rounded in groups of {self.block[1]}, which do not divide K = {shape[1]}",
                where=module,
                way_out="Leave the module out (modules_to_not_convert)",
            )

    def _grid(self, shape: Shape) -> tuple[int, int]:
        rows, columns = self.block or shape
        return ceil(shape[0], rows), ceil(shape[1], columns)

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        shapes = (self._grid(shape),) if self.block is not None else ((), (1,), (1, 1))
        dtypes = frozenset({"F8_E8M0", "U8"}) if self.exponents else SCALES
        found: Layout = {"weight": (frozenset({"F8_E4M3"}), (shape,)), "weight_scale_inv": (dtypes, shapes)}
        if self.static:
            found["activation_scale"] = (SCALES, ((), (1,)))
        return found

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        name = f"{module}.weight_scale_inv"
        stored = read(name)
        found = powers_of_two(stored, name) if self.exponents else scheme.positive_scales(stored, name)
        rows, columns = self.block or shape
        scales = spread_rows(found.reshape(self._grid(shape)), shape[0], rows)
        codes = fp8_codes(read(f"{module}.weight"), f"{module}.weight")
        kind = scheme.dtype_name(stored)
        return QuantizedTensor(
            codes, np.ascontiguousarray(scales), None, 8, min(columns, shape[1]), shape, "fine-grained fp8", kind, E4M3
        )

    def activation(self, read: Read, module: str) -> Activation:
        """See Scheme."""
        if self.static:
            name = f"{module}.activation_scale"
            return Activation(E4M3, scale=float(scheme.positive_scales(read(name), name).reshape(-1)[0]))
        columns = read(f"{module}.weight").shape[1]
        group = columns if self.block is None else min(self.block[1], columns)
        return Activation(E4M3, 0 if group == columns else group)


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every linear layer but those of modules_to_not_convert (ignored_layers)."""
    block = config.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
    ):
        scheme.refuse(f"is {block!r:.80}", ".weight_block_size", "Give two positive whole numbers, or null")
    activation = config.get("activation_scheme", "dynamic")
    if activation not in _SCHEMES:
        scheme.refuse(f"is {activation!r:.80}", ".activation_scheme", f"Supported: {', '.join(_SCHEMES)}")
    form = config.get("scale_fmt") or "float"
    if form not in ("float", "ue8m0"):
        scheme.refuse(f"is {form!r:.80}", ".scale_fmt", "Supported: float, ue8m0")
    kind = config.get("fmt", "e4m3")
    if kind != "e4m3":
        scheme.refuse(f"is {kind!r:.80}", ".fmt", "Supported: e4m3")
    for key in ("modules_to_convert", "kv_cache_scheme"):
        if config.get(key):
            scheme.refuse(f"{key} is set", f".{key}", "Convert linear layers alone, and leave the cache in float")
    left_out = config.get("modules_to_not_convert")
    left_out = config.get("ignored_layers") if left_out is None else left_out
    keys = matching.names(left_out, ".modules_to_not_convert")
    found = FineGrained(None if block is None else (block[0], block[1]), form == "ue8m0", activation == "static")
    return {
        name: found
        for name, classes in modules.items()
        if "Linear" in classes
        and not matching.excluded(name, keys, ".modules_to_not_convert")
        and (name != "lm_head" or f"{name}.weight_scale_inv" in stored.tensors)  # which the library never converts
    }
