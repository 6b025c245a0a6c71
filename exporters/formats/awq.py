"""AWQ checkpoints in the "gemm" layout, as AutoAWQ writes them: 4 bits with zero points.

Source: github.com/casper-hansen/AutoAWQ 0.2.9 (awq/modules/linear/gemm.py, awq/utils/packing_utils.py). For a weight
[N, K] in G groups: ``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8], ``scales`` [G, N]. Field i of a word, from
the low bits, holds column ORDER[i] of its eight. weight = (code - zero) * scale; nothing is taken from a zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import matching, scheme
from exporters.formats.gptq import zero_bias
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Scheme, Shape
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4
_INT32 = frozenset({"I32"})


@dataclass(frozen=True)
class Awq(Scheme):
    """One linear layer; ``group`` is None for one scale per output channel."""

    group: int | None

    def check(self, module: str, shape: Shape) -> None:
        """Refuse shapes that words and groups do not divide; AutoAWQ writes none."""
        for size, by, what in ((shape[0], 8, "rows"), (shape[1], self.group or shape[1], "columns")):
            if size % by:
                raise QuantizationError(
                    f"{size} {what} do not divide by {by}",
                    where=f"{module}.qweight",
                    way_out=f"Correct config.json. {AGAIN}",
                )

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        rows, columns = shape
        groups = columns // (self.group or columns)
        return {
            "qweight": (_INT32, ((columns, rows // 8),)),
            "qzeros": (_INT32, ((groups, rows // 8),)),
            "scales": (SCALES, ((groups, rows),)),
        }

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        stored = read(f"{module}.scales")
        return QuantizedTensor.from_codes(
            _fields(read(f"{module}.qweight").numpy()),
            np.ascontiguousarray(scheme.positive_scales(stored, f"{module}.scales").T),
            _fields(read(f"{module}.qzeros").numpy()),
            bits=BITS,
            source=METHOD,
            scale_dtype=scheme.dtype_name(stored),
            group=self.group or shape[1],
        )

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """A bias of zeros, as in GPTQ."""
        yield from zero_bias(module, stored)


def _fields(words: Array) -> Array:
    """Words [R, N/8] -> uint8 [N, R] in the natural order of N."""
    fields = scheme.unpack_words(words, BITS, 8 * words.shape[1], METHOD).reshape(words.shape[0], -1, 8)
    natural = np.empty_like(fields)
    natural[..., ORDER] = fields
    return np.ascontiguousarray(natural.reshape(words.shape[0], -1).T)


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has a ``qweight``; what is stored as ``weight`` stays a float one."""
    scheme.whole(config, "bits" if "bits" in config else "w_bit", (BITS,), ".bits")
    size = scheme.whole(config, "group_size" if "group_size" in config else "q_group_size", None, ".group_size")
    form = config.get("version") or config.get("format")
    if not isinstance(form, str) or form.lower() != "gemm":
        scheme.refuse(f"version is {form!r:.80}", ".version", 'Save it in the layout "gemm"')
    if config.get("backend") == "llm-awq":
        scheme.refuse("backend is 'llm-awq', whose layout is another", ".backend", "Save it with AutoAWQ as gemm")
    if not scheme.flag(config, "zero_point", ".zero_point"):
        scheme.refuse("zero_point is false", ".zero_point", "gemm stores zero points: save the checkpoint with them")
    left_out = matching.names(config.get("modules_to_not_convert"), ".modules_to_not_convert")
    result: dict[str, Scheme] = {}
    for name in modules:
        if f"{name}.qweight" not in stored.tensors:
            continue
        if matching.excluded(name, left_out, ".modules_to_not_convert"):
            raise QuantizationError(
                "is stored, but modules_to_not_convert leaves the module out",
                where=f"{name}.qweight",
                way_out=f"Correct config.json. {AGAIN}",
            )
        result[name] = Awq(None if size == -1 else size)
    return result
