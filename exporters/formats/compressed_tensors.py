"""compressed-tensors: quantization_config with config_groups, and the two integer formats; for those of float codes
see compressed_floats, for rounded inputs compressed_activations.

Source: github.com/vllm-project/compressed-tensors 0.20 (compressors/pack_quantized, compressors/naive_quantized,
utils/match). It stores signed integers q in [-2**(bits-1), 2**(bits-1)); the code is q + 2**(bits-1), likewise for
zero points, so (q - z) = (code - zero_point). `pack-quantized` holds q + 2**(bits-1) in int32 words, element i of a row
at bit i*bits, low bits first; its zero points are packed the same way along N. `int-quantized` holds q as int8.

Releases before 0.20 could reorder columns by activation (actorder "group"): weight_g_idx [K] is then the group of every
input feature, -1 throughout where none was set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from exporters.errors import QuantizationError
from exporters.formats import matching, scheme
from exporters.formats.compressed_activations import Rounded, Rounding, rounding
from exporters.formats.compressed_floats import FloatScheme
from exporters.formats.scheme import SCALES, Array, Layout, Read, Scheme, Shape, ceil, check_group
from exporters.quantized import FIELDS, QuantizedTensor

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class IntegerScheme(Rounded):
    """What both integer formats have in common.

    Attributes:
        group: columns with one scale, None for one scale per output channel.
        per_tensor: one scale for the whole weight.
        ordered: weight_g_idx says which columns share a scale.
        rounding: how the layer's input is rounded.
    """

    bits: int
    symmetric: bool
    group: int | None
    per_tensor: bool = False
    ordered: bool = False
    rounding: Rounding | None = None

    def check(self, module: str, shape: Shape) -> None:
        """Refuse a group size that does not divide K: the library cannot dequantise a shorter last group."""
        if self.group is not None:
            check_group(module, self.group, shape[1])
        super().check(module, shape)

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """All-zero zero points of symmetric weights, which older writers keep, and indices that say nothing."""
        name = f"{module}.weight_g_idx"
        if not self.ordered and name in stored.tensors:
            self._check_index(stored.tensor(name).numpy(), name)
            yield name
        name = f"{module}.weight_zero_point"
        if self.symmetric and name in stored.tensors:
            if stored.tensors[name].dtype != "I8" or stored.tensor(name).any():
                raise QuantizationError(
                    "holds zero points, but the scheme says symmetric",
                    where=name,
                    way_out="State symmetric: false, or drop the tensor",
                )
            yield name
        yield from super().leftovers(module, stored)

    def _check_index(self, index: Array, where: str) -> None:
        """Without actorder, weight_g_idx must not reorder anything."""
        if index.ndim != 1 or ((index != -1).any() and self._order(index, where) is not None):
            raise QuantizationError(
                "reorders the columns (act-order), but the scheme has no actorder",
                where=where,
                way_out='State actorder: "group", or drop the tensor',
            )

    def _order(self, index: Array, where: str) -> Array | None:
        return scheme.act_order(index, self.group or index.shape[0], where)

    def _groups(self, columns: int) -> int:
        return 1 if self.group is None else ceil(columns, self.group)

    def _grid(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        if self.per_tensor:
            return ((1,), (1, 1), ())
        if self.group is None:
            return ((shape[0], 1), (shape[0],))
        return ((shape[0], self._groups(shape[1])),)

    def _more(self, shape: Shape) -> Layout:
        """Tensors beside codes, scales and zero points."""
        found: Layout = {} if self.rounding is None else self.rounding.layout()
        return found | ({"weight_g_idx": (frozenset({"I32", "I64"}), ((shape[1],),))} if self.ordered else {})

    def _tensor(
        self,
        read: Read,
        module: str,
        shape: Shape,
        codes: Array,
        zeros: Array | None,
        source: str,
        packed: bool = False,
    ) -> QuantizedTensor:
        """Codes [N, K] (or ``packed``, of a matrix in natural order) and zero points in any of the grid's shapes, with
        the scales and the order that are stored."""
        rows, columns = shape
        name = f"{module}.weight_scale"
        stored = read(name)
        grid = (rows, self._groups(columns))

        def spread(values: Array) -> Array:
            whole = values.reshape((1, 1) if self.per_tensor else grid)
            return np.ascontiguousarray(np.broadcast_to(whole, grid))

        order = None
        if self.ordered and (index := read(f"{module}.weight_g_idx").numpy()).min(initial=0) >= 0:
            order = self._order(index, f"{module}.weight_g_idx")
        elif self.ordered and (index != -1).any():
            self._order(index, f"{module}.weight_g_idx")  # some are set, some are not: refused there
        scales, points = spread(scheme.positive_scales(stored, name)), None if zeros is None else spread(zeros)
        group, dtype = self.group or columns, scheme.dtype_name(stored)
        if packed:
            return QuantizedTensor(codes, scales, points, self.bits, group, shape, source, dtype)
        ordered = codes if order is None else codes[:, order]
        return QuantizedTensor.from_codes(
            ordered, scales, points, bits=self.bits, source=source, scale_dtype=dtype, group=group, order=order
        )


@dataclass(frozen=True)
class PackQuantized(IntegerScheme):
    """Codes in int32 words."""

    def check(self, module: str, shape: Shape) -> None:
        """Also refuses 3, 5, 6 or 7 bits where dense words and those of older releases have the same shape."""
        super().check(module, shape)
        each, columns = 32 // self.bits, shape[1]
        if 32 % self.bits and columns > each and ceil(columns * self.bits, 32) == ceil(columns, each):
            raise QuantizationError(
                f"{columns} columns of {self.bits} bits have the same shape packed densely (0.20) and with {each} to a"
                " word (before)",
                where=f"{module}.weight_packed",
                way_out="Quantise this module with 4 bits",
            )

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        rows, columns = shape
        found: Layout = {
            "weight_packed": (frozenset({"I32"}), ((rows, ceil(columns * self.bits, 32)),)),
            "weight_scale": (SCALES, self._grid(shape)),
            "weight_shape": (frozenset({"I64", "I32"}), ((2,),)),
        }
        if not self.symmetric:
            words = (ceil(rows * self.bits, 32), self._groups(columns))
            found["weight_zero_point"] = (frozenset({"I32"}), (words,))
        return found | self._more(shape)

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        stated = tuple(read(f"{module}.weight_shape").tolist())
        if stated != shape:
            raise QuantizationError(
                f"says {stated}, the model's weight is {shape}",
                where=f"{module}.weight_shape",
                way_out="Take config.json and the weights from one checkpoint",
            )
        name = f"{module}.weight_packed"
        as_stored = FIELDS[self.bits] == self.bits and not self.ordered  # the words hold what is asked for
        read_codes = scheme.packed_words if as_stored else scheme.unpack_words
        codes = read_codes(read(name).numpy(), self.bits, shape[1], name)
        zeros = None
        if not self.symmetric:  # packed along N: transposed, a row of words is one group column's zero points
            name = f"{module}.weight_zero_point"
            zeros = scheme.unpack_words(read(name).numpy().T, self.bits, shape[0], name).T
        return self._tensor(read, module, shape, codes, zeros, "pack-quantized", packed=as_stored)


@dataclass(frozen=True)
class IntQuantized(IntegerScheme):
    """Codes as signed bytes."""

    def layout(self, shape: Shape) -> Layout:
        """See Scheme."""
        found: Layout = {"weight": (frozenset({"I8"}), (shape,)), "weight_scale": (SCALES, self._grid(shape))}
        if not self.symmetric:
            found["weight_zero_point"] = (frozenset({"I8"}), self._grid(shape))
        return found | self._more(shape)

    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """See Scheme."""
        zeros = None if self.symmetric else self._unsigned(read, f"{module}.weight_zero_point")
        return self._tensor(read, module, shape, self._unsigned(read, f"{module}.weight"), zeros, "int-quantized")

    def _unsigned(self, read: Read, name: str) -> Array:
        return scheme.unsigned(read(name).numpy(), self.bits, name)


#: format of a config group -> its scheme
FORMATS: Mapping[str, type[IntegerScheme]] = {"pack-quantized": PackQuantized, "int-quantized": IntQuantized}
BITS = range(2, 9)
#: format of a config group -> (bits, how scales are stored) of float codes
FLOATS: Mapping[str, tuple[int, str]] = {
    "float-quantized": (8, "float"),
    "mxfp8-quantized": (8, "exponent"),
    "nvfp4-pack-quantized": (4, "float8"),
    "mxfp4-pack-quantized": (4, "exponent"),
}
#: columns that share a scale which is not a float
_SIZES = {"float8": 16, "exponent": 32}
SUPPORTED = (
    f"Supported: {METHOD} int{BITS[0]} to int{BITS[-1]} as {', '.join(FORMATS)}, and float codes as {', '.join(FLOATS)}"
)


def _refuse(what: str, at: str, way_out: str = SUPPORTED) -> NoReturn:
    scheme.refuse(what, at, way_out)


def _scheme(group: Any, at: str, default_format: Any) -> Scheme:
    if not isinstance(group, dict):
        _refuse(f"is {group!r:.100}", at, "Write the scheme out: targets and weights")
    if group.get("output_activations") is not None:
        _refuse("output_activations are quantised", at, "Quantise inputs alone")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        _refuse("has no weights", at)
    form = group.get("format") or default_format
    inputs = rounding(group.get("input_activations"), at)
    if form in FLOATS:
        return _float_scheme(form, weights, inputs, at)
    if form not in FORMATS:
        _refuse(f"unknown format {form!r}", at)
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if kind != "int" or isinstance(bits, bool) or bits not in BITS:
        _refuse(f"weights are {kind!r} of {bits!r} bits", at)
    symmetric = scheme.flag(weights, "symmetric", at)
    if weights.get("dynamic"):
        _refuse("weights are quantised dynamically", at)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("tensor", "channel", "group"):
        _refuse(f"strategy {strategy!r}", at, "Supported strategies: tensor, channel, group")
    if strategy == "group" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        _refuse(f"group_size is {size!r}", at, "Give a positive whole number")
    if strategy == "tensor" and form == "pack-quantized" and not symmetric:
        _refuse("pack-quantized has no form for an asymmetric per-tensor zero point", at)
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    if ordered and strategy != "group":
        _refuse(f"actorder {weights['actorder']!r} needs groups, the strategy is {strategy}", at)
    return FORMATS[form](bits, symmetric, size if strategy == "group" else None, strategy == "tensor", ordered, inputs)


def _float_scheme(form: str, weights: Mapping[str, Any], inputs: Rounding | None, at: str) -> FloatScheme:
    bits, scales = FLOATS[form]
    kind, stated, size = weights.get("type", "int"), weights.get("num_bits"), weights.get("group_size")
    if kind != "float" or isinstance(stated, bool) or stated != bits:
        _refuse(f"{form} with weights of {kind!r:.40} {stated!r:.40} bits", at)
    if weights.get("symmetric", True) is not True:
        _refuse("float weights that are not symmetric", at, "There are no zero points of float codes")
    if weights.get("dynamic") or weights.get("actorder"):
        _refuse("float weights that are dynamic or reordered", at)
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if scales != "float":
        if size != _SIZES[scales]:
            _refuse(f"{form} with group_size {size!r:.40}", at, f"It has groups of {_SIZES[scales]}")
        return FloatScheme(form, bits == 4, scales, (1, size), inputs)
    if strategy == "block":
        block = weights.get("block_structure")
        sound = isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
        if not sound:
            _refuse(f"block_structure is {block!r:.80}", at, "Give two positive whole numbers, as in [128, 128]")
        return FloatScheme(form, False, scales, (block[0], block[1]), inputs)
    if strategy == "group":
        return FloatScheme(form, False, scales, (1, scheme.whole(weights, "group_size", None, at)), inputs)
    if strategy not in ("tensor", "channel"):
        _refuse(f"strategy {strategy!r:.40}", at, "Supported strategies: tensor, channel, group, block")
    return FloatScheme(form, False, scales, (0 if strategy == "tensor" else 1, None), inputs)


def _groups(config: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    version = config.get("version")
    if version is not None and (not isinstance(version, str) or not re.match(r"0\.\d", version)):
        _refuse(f"unknown version {version!r}", ".version", "Versions 0.x of the format are known")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        _refuse(f"is {status!r}, not compressed", ".quantization_status", "Save the checkpoint compressed")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key):
            _refuse(f"{key} is set", f".{key}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= 1000:
        _refuse("config_groups is missing or empty", ".config_groups", "Say which modules are quantised, and how")
    form = config.get("format")
    result = []
    for name, group in groups.items():
        at = f".config_groups.{name}"
        found = _scheme(group, at, None if form == "mixed-precision" else form)
        result.append((matching.names(group.get("targets"), f"{at}.targets"), found))
    return result


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every quantised module: exact names win over patterns, those over classes; `ignore` over all."""
    groups = _groups(config)
    ignore = matching.names(config.get("ignore"), ".ignore")
    result: dict[str, Scheme] = {}
    for name, classes in modules.items():
        if any(matching.rank(name, classes, item) < matching.NONE for item in ignore):
            continue
        ranked = [
            (matching.rank(name, classes, target), index)
            for index, (targets, _) in enumerate(groups)
            for target in targets
        ]
        best = min(ranked, default=(matching.NONE, 0))
        if best[0] < matching.NONE:
            result[name] = _as_stored(groups[best[1]][1], name, stored)
    return result


def _as_stored(found: Scheme, name: str, stored: Checkpoint) -> Scheme:
    """Releases that knew actorder left weight_g_idx out of modules whose order came out natural."""
    if isinstance(found, IntegerScheme) and found.ordered and f"{name}.weight_g_idx" not in stored.tensors:
        return replace(found, ordered=False)
    return found
