"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: 2, 3, 4 or 8 bits, act-order, v1 and v2.

Source: github.com/ModelCloud/GPTQModel 7.7 (nn_modules/qlinear, utils/model_dequant, utils/model). For a weight [N, K]
in G groups: ``qweight`` int32 [K*bits/32, N], element i of a column at bit i*bits of its words, low bits first;
``qzeros`` int32 [G, N*bits/32] packed the same way along N; ``scales`` [G, N]; ``g_idx`` [K], the group of every input
feature. weight = (code - zero) * scale.

Zero points. "gptq_v2" stores them as they are; "gptq" (v1) stores zero - 1. A file that states neither is v1: that is
the default of GPTQConfig in transformers and of QuantizeConfig in GPTQModel. In v1 a field of ones is read as 2**bits
by some libraries and as 0 by others, and writers disagree on what a zero point of 0 does to its neighbours:
GPTQModel takes 1 from each field of a whole word, with borrows, and adds it back the same way; AutoGPTQ did not. So
such a field is decoded where ``meta.quantizer`` names GPTQModel, and refused elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import matching, scheme
from exporters.formats.scheme import AGAIN, SCALES, Array, Layout, Read, Scheme, Shape, ceil
from exporters.quantized import QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "gptq"
BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
_INT32 = frozenset({"I32"})


@dataclass(frozen=True)
class Gptq(Scheme):
    """One linear layer.

    Attributes:
        group: columns with one scale, None for one scale per output channel.
        version: V1 or V2.
        borrows: v1 zero points were made by GPTQModel's subtraction of whole words.
        ordered: g_idx is stored.
    """

    bits: int
    group: int | None
    version: str
    borrows: bool
    ordered: bool

    def _grid(self, shape: Shape) -> tuple[int, int]:
        return (1 if self.group is None else ceil(shape[1], self.group), shape[0])

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        groups, rows = self._grid(shape)
        found: Layout = {
            "qweight": (_INT32, ((ceil(shape[1] * self.bits, 32), rows),)),
            "qzeros": (_INT32, ((groups, ceil(rows * self.bits, 32)),)),
            "scales": (SCALES, ((groups, rows),)),
        }
        if self.ordered:
            found["g_idx"] = (frozenset({"I32", "I64"}), ((shape[1],),))
        return found

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        rows, columns = shape
        name = f"{module}.qweight"
        codes = scheme.unpack_words(read(name).numpy().T, self.bits, columns, name)
        stored = read(f"{module}.scales")
        order = None
        if self.ordered:
            order = scheme.act_order(read(f"{module}.g_idx").numpy(), self.group or columns, f"{module}.g_idx")
        zeros = self._zeros(read(f"{module}.qzeros").numpy(), rows, f"{module}.qzeros").T
        symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        return QuantizedTensor.from_codes(
            codes if order is None else codes[:, order],
            np.ascontiguousarray(scheme.positive_scales(stored, f"{module}.scales").T),
            None if symmetric else np.ascontiguousarray(zeros),
            bits=self.bits,
            source=self.version,
            scale_dtype=scheme.dtype_name(stored),
            group=self.group or columns,
            order=order,
        )

    def _zeros(self, words: Array, rows: int, where: str) -> Array:
        """Zero points uint8 [G, N]; padding at the end of a row of v1 may hold anything."""
        if self.version == V2:
            return scheme.unpack_words(words, self.bits, rows, where)
        if self.borrows and self.bits != 3:
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, self.bits)))
            words = (words.view(np.uint32) + ones).view(np.int32)
            return scheme.unpack_words(words, self.bits, ceil(rows * self.bits, 32) * 32 // self.bits, where)[:, :rows]
        mask = np.uint8((1 << self.bits) - 1)
        fields = scheme.unpack_words(words, self.bits, words.shape[1] * 32 // self.bits, where)[:, :rows]
        if not self.borrows and (fields == mask).any():
            raise QuantizationError(
                f"holds {mask}, one less than a zero point of {int(mask) + 1} or 0: readers of v1 disagree",
                where=where,
                way_out='Save it with GPTQModel as "gptq_v2", whose zero points are stored as they are',
            )
        return (fields + np.uint8(1)) & mask

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """A bias of zeros, which AutoGPTQ writes for layers that have none."""
        yield from zero_bias(module, stored)


def zero_bias(module: str, stored: Checkpoint) -> Iterator[str]:
    """The bias of a layer, where it is nothing but zeros; the caller passes it over if the model has none."""
    name = f"{module}.bias"
    if name in stored.tensors and not stored.tensor(name).any():
        yield name


def _override(name: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """GPTQModel's dynamic: the first pattern that matches gives the module its own values; None: not quantised."""
    for pattern, values in dynamic.items():
        at = f".dynamic.{pattern:.100}"
        bare = pattern.removeprefix("+:").removeprefix("-:")
        matching.check_pattern(bare, at)
        if re.match(bare, name):
            if pattern.startswith("-:"):
                return None
            if not isinstance(values, dict):
                scheme.refuse(f"is {values!r:.80}", at, 'Give an object such as {"bits": 8}')
            return values
    return {}


def _version(config: Mapping[str, Any]) -> tuple[str, bool]:
    form = config.get("checkpoint_format") or config.get("format") or V1
    if form not in (V1, V2):
        scheme.refuse(
            f"checkpoint_format is {form!r:.80}", ".checkpoint_format", f'Supported: "{V1}" and "{V2}", packed in int32'
        )
    if config.get("pack_dtype", "int32") not in ("int32", None):
        scheme.refuse(f"pack_dtype is {config['pack_dtype']!r:.80}", ".pack_dtype", "Pack it in int32")
    meta = config.get("meta")
    writers = meta.get("quantizer", []) if isinstance(meta, dict) else []
    names = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    return form, any(str(writer).lower().startswith("gptqmodel") for writer in names)


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has a ``qweight``; what is stored as ``weight`` stays a float one."""
    version, borrows = _version(config)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or len(dynamic) > 1000:
        scheme.refuse("is not an object of patterns", ".dynamic", "Give patterns and their values")
    result: dict[str, Scheme] = {}
    for name, classes in modules.items():
        if f"{name}.qweight" not in stored.tensors:
            continue
        if "Embedding" in classes:
            raise QuantizationError(
                "an embedding table is quantised, whose layout is another",
                where=f"{name}.qweight",
                way_out="Leave the embedding in float",
            )
        values = _override(name, dynamic)
        if values is None:
            raise QuantizationError(
                "is stored, but quantization_config.dynamic leaves the module out",
                where=f"{name}.qweight",
                way_out=f"Correct config.json. {AGAIN}",
            )
        own = {**config, **values}
        bits = scheme.whole(own, "bits", BITS, ".bits")
        group = scheme.whole(own, "group_size", None, ".group_size")
        ordered = f"{name}.g_idx" in stored.tensors or bool(own.get("desc_act"))
        result[name] = Gptq(bits, None if group == -1 else group, version, borrows, ordered)
    return result
