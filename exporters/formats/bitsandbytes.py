"""bitsandbytes checkpoints: LLM.int8 weights; those of 4 bits are in bitsandbytes_nf4.py.

Source: bitsandbytes 0.50 (nn/modules.py, functional.int8_vectorwise_dequant). ``weight`` int8 [N, K] in row-major
order, ``SCB`` float32 [N], the largest magnitude of every row: weight = q * SCB / 127. ``weight_format`` uint8 is the
order, 0 for rows. What the library does to activations (outliers in float16, the rest in int8) is a matter of its
kernels, not of the weights, and is not carried over.

The scale SCB / 127 is rounded to float32 once; q is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import bitsandbytes_nf4, scheme
from exporters.formats.scheme import Layout, Read, Scheme, Shape
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "bitsandbytes"
_ROW_MAJOR = 0


@dataclass(frozen=True)
class Int8(Scheme):
    """One linear layer; ``stated`` says whether weight_format is stored."""

    stated: bool

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        found: Layout = {
            "weight": (frozenset({"I8"}), (shape,)),
            "SCB": (frozenset({"F32"}), ((shape[0],), (shape[0], 1))),
        }
        if self.stated:
            found["weight_format"] = (frozenset({"U8"}), ((), (1,)))
        return found

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        if self.stated and (form := int(read(f"{module}.weight_format").reshape(-1)[0])) != _ROW_MAJOR:
            raise QuantizationError(
                f"names the order {form}, that of a GPU's tiles",
                where=f"{module}.weight_format",
                way_out="Save the checkpoint with bitsandbytes 0.45 or newer, which store rows",
            )
        largest = scheme.positive_scales(read(f"{module}.SCB"), f"{module}.SCB").reshape(-1, 1)
        return QuantizedTensor.from_codes(
            scheme.unsigned(read(f"{module}.weight").numpy(), 8, f"{module}.weight"),
            np.ascontiguousarray((largest.astype(np.float64) / 127).astype(np.float32)),
            None,
            bits=8,
            source="bitsandbytes int8",
        )


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has an ``SCB`` (int8) or a quant_state (nf4); float ones stay so."""
    if config.get("load_in_4bit") and not config.get("load_in_8bit"):
        return bitsandbytes_nf4.schemes(config, modules, stored)
    if not config.get("load_in_8bit"):
        scheme.refuse("neither load_in_8bit nor load_in_4bit is true", ".load_in_8bit", "Supported: int8, nf4")
    return {
        name: Int8(f"{name}.weight_format" in stored.tensors) for name in modules if f"{name}.SCB" in stored.tensors
    }
