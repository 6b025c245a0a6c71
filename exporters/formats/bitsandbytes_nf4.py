"""bitsandbytes' 4-bit weights: nf4, with plain or nested scales.

Source: bitsandbytes 0.50 (nn/modules.py, functional.QuantState). ``weight`` uint8 [N*K/2, 1]: two codes a byte, the
HIGH nibble first, over the matrix row by row; ``weight.quant_map`` float32 [16], the value of each code;
``weight.absmax``, one scale per ``blocksize`` codes, float32, or where the scales are quantised themselves uint8 codes
into ``weight.nested_quant_map`` [256], times ``weight.nested_absmax`` per 256 scales, plus nested_offset: float32
operations in that order, as the library's. ``weight.quant_state.bitsandbytes__nf4`` is JSON with the numbers.

Blocks run over the flattened matrix: where they do not end with a row, groups of gcd(K, blocksize) columns lie within
one block each, and repeat its scale. (There 0.50's own dequantisation on a CPU is wrong: weights of K = 96 come back
2.0 away from those that were quantised, where these are 0.36 away, as they are for K = 128.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.encodings import values
from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.scheme import AGAIN, Array, Layout, Read, Scheme, Shape, ceil
from exporters.quantized import QuantizedTensor
from exporters.strict_json import parse_json

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_F32 = frozenset({"F32"})


@dataclass(frozen=True)
class NormalFloat4(Scheme):
    """One linear layer.

    Attributes:
        block: codes that share a scale.
        nested: scales that share one of their own, 0 where they are float32.
        offset: what is added to nested scales.
        length: bytes of the stored JSON.
        shape: that it states.
    """

    block: int
    nested: int
    offset: float
    length: int
    shape: tuple[int, ...]

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        blocks = ceil(shape[0] * shape[1], self.block)
        found: Layout = {
            "weight": (frozenset({"U8"}), ((ceil(shape[0] * shape[1], 2), 1),)),
            "weight.absmax": (frozenset({"U8"}) if self.nested else _F32, ((blocks,),)),
            "weight.quant_map": (_F32, ((16,),)),
            STATE: (frozenset({"U8"}), ((self.length,),)),
        }
        if self.nested:
            found["weight.nested_absmax"] = (_F32, ((ceil(blocks, self.nested),),))
            found["weight.nested_quant_map"] = (_F32, ((256,),))
        return found

    def check(self, module: str, shape: Shape) -> None:
        """See Scheme."""
        if self.shape != shape:
            raise QuantizationError(
                f"says {list(self.shape)!r:.80}, the model's weight is {list(shape)}",
                where=f"{module}.{STATE}",
                way_out="Take config.json and the weights from one checkpoint",
            )
        if shape[0] * shape[1] % 2:
            raise QuantizationError(f"{shape[0]} x {shape[1]} codes do not fill bytes", where=module, way_out=AGAIN)

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        name = f"{module}.weight.quant_map"
        if not np.array_equal(read(name).numpy(), values("nf4")):
            raise QuantizationError(
                "is not the table of nf4", where=name, way_out=f"Only the standard table is known. {AGAIN}"
            )
        packed = read(f"{module}.weight").numpy().reshape(-1)
        codes = np.stack((packed >> np.uint8(4), packed & np.uint8(15)), -1).reshape(-1)[: shape[0] * shape[1]]
        group = math.gcd(shape[1], self.block)
        starts = np.arange(0, shape[0] * shape[1], group) // self.block
        scales = self._scales(read, module)[starts].reshape(shape[0], -1)
        return QuantizedTensor.from_codes(
            np.ascontiguousarray(codes.reshape(shape)),
            np.ascontiguousarray(scales),
            None,
            bits=4,
            source="bitsandbytes nf4",
            scale_dtype="uint8" if self.nested else "float32",
            group=group,
            encoding="nf4",
        )

    def _scales(self, read: Read, module: str) -> Array:
        """float32, one for each block. A block without a weight has the scale 0."""
        name = f"{module}.weight.absmax"
        stored = read(name).numpy()
        if self.nested:
            table, outer = (read(f"{module}.weight.{part}").numpy() for part in ("nested_quant_map", "nested_absmax"))
            each = np.repeat(outer, self.nested)[: len(stored)]
            stored = table[stored] * each + np.float32(self.offset)
        if not np.isfinite(stored).all():
            raise QuantizationError("holds a scale that is not finite", where=name, way_out=AGAIN)
        return stored.astype(np.float32)


def read_state(raw: bytes, where: str) -> NormalFloat4:
    """The scheme that a module's quant_state says; refuses other kinds by name."""
    state = parse_json(raw, where)
    if not isinstance(state, dict):
        raise QuantizationError("is not an object of JSON", where=where, way_out=AGAIN)
    if state.get("quant_type") != "nf4":
        raise QuantizationError(f"quant_type is {state.get('quant_type')!r:.40}", where=where, way_out="Supported: nf4")
    block, nested, offset = state.get("blocksize"), state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
    if type(block) is not int or block not in _BLOCKS:
        known = ", ".join(map(str, _BLOCKS))
        raise QuantizationError(f"blocksize is {block!r:.40}", where=where, way_out=f"Supported: {known}")
    if type(nested) is not int or nested < 0 or type(offset) not in (int, float):
        raise QuantizationError(
            f"nested_blocksize is {nested!r:.40}, nested_offset {offset!r:.40}", where=where, way_out=AGAIN
        )
    return NormalFloat4(block, nested, float(offset), len(raw), tuple(state.get("shape") or ()))


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has a quant_state; what is stored in float stays so."""
    kind = config.get("bnb_4bit_quant_type", "nf4")
    if config.get("load_in_4bit") is not True or kind != "nf4":
        scheme.refuse(f"4-bit weights of type {kind!r:.40}", ".bnb_4bit_quant_type", "Supported: nf4 (load_in_4bit)")
    names = {name: f"{name}.{STATE}" for name in modules}
    return {
        name: read_state(stored.tensor(state).numpy().tobytes(), state)
        for name, state in names.items()
        if state in stored.tensors
    }
