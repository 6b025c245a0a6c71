"""How the input of a torchao layer is rounded: the options that its weight's entry in the header carries.

Source: torchao 0.18 (quantization/quantize_/workflows: int8_tensor, float8_tensor, intx_unpacked_to_int8_tensor;
quant_primitives.choose_qparams_affine). The scales are those of compressed-tensors: the largest magnitude over 127.5
(int8) or 448 (e4m3), or the range over 255. torchao multiplies by a scale's reciprocal where compressed-tensors, and
we, divide: a value that lies on a tie may fall to its other side, as -127.5, the largest of a row, does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporters.formats.compressed_activations import Rounding
from exporters.formats.torchao_header import PREFIX, Described, plain

WEIGHT_ONLY = "Quantise weights alone"
_NAMES = (f"{PREFIX}act_quant_scale", f"{PREFIX}act_quant_zero_point")


def _options(entry: Described) -> Mapping[str, Any] | None:
    found = entry.data.get("act_quant_kwargs")
    if found is None:
        return None
    options = plain(found)
    if not isinstance(options, dict):
        entry.refuse(f"act_quant_kwargs is {found!r:.80}", WEIGHT_ONLY)
    return options


def _granularity(entry: Described, options: Mapping[str, Any]) -> tuple[str, int]:
    """(class, columns of a group; 0 for all of a row)."""
    found = options.get("granularity")
    kind, data = (found.get("_type"), found.get("_data")) if isinstance(found, dict) else (None, None)
    data = data if isinstance(data, dict) else {}
    if kind == "PerRow" and data.get("dim", -1) == -1:
        return kind, 0
    size = data.get("block_size")
    if kind == "PerBlock" and isinstance(size, list) and size[:-1] == [1] and type(size[1]) is int and size[1] > 0:
        return kind, size[1]
    if kind != "PerTensor":
        entry.refuse(f"activations have the granularity {found!r:.80}", "Quantise them per row")
    return kind, 0


def _dynamic(entry: Described, options: Mapping[str, Any]) -> int:
    """Columns of a group. Refuses one scale for all tokens that are run together."""
    kind, group = _granularity(entry, options)
    if kind == "PerTensor":
        entry.refuse(
            "takes one scale from all tokens that are run together, so that a token's result would depend on them",
            "Quantise with granularity PerRow(), or with a static scale",
        )
    return group


def _int8(entry: Described) -> Rounding | None:
    options = _options(entry)
    if options is None:
        return None
    if options.get("reduce_range"):
        entry.refuse("activations have a reduced range of 7 bits", "Quantise with reduce_range=False")
    mapping = plain(options.get("mapping_type", "SYMMETRIC"))
    if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        entry.refuse(f"activations are mapped {mapping!r:.80}", "Map them SYMMETRIC or ASYMMETRIC")
    if "act_quant_scale" in entry.parts:
        symmetric = mapping == "SYMMETRIC" or "act_quant_zero_point" not in entry.parts
        return Rounding("int8", symmetric=symmetric, static=True, names=_NAMES)
    return Rounding("int8", _dynamic(entry, options), mapping == "SYMMETRIC")


def _intx(entry: Described) -> Rounding | None:
    kind = entry.value("activation_quantization")
    if kind is None:
        return None
    if not isinstance(kind, str) or kind.lower() != "int8_asym_per_token":
        entry.refuse(f"activations are quantised as {kind!r:.80}", WEIGHT_ONLY)
    return Rounding("int8", symmetric=False)


def _float8(entry: Described) -> Rounding | None:
    options = _options(entry)
    if options is None:
        return None
    if plain(options.get("float8_dtype", "float8_e4m3fn")) != "float8_e4m3fn":
        entry.refuse(f"activations are {plain(options['float8_dtype'])!r:.80}", "Quantise them to float8_e4m3fn")
    for key in ("hp_value_lb", "hp_value_ub"):
        if options.get(key) is not None:
            entry.refuse(f"{key} bounds the scale of activations", "Quantise without activation_value_lb and _ub")
    return Rounding("float8_e4m3fn", _dynamic(entry, options))


def _none(entry: Described) -> None:
    """NVFP4's scales of activations are at least 2^-6, MX's are powers of two: rules that no backend here has."""
    if entry.data.get("act_quant_kwargs") is not None:
        entry.refuse(
            f"activations are quantised by {entry.kind}'s own rule",
            f"{WEIGHT_ONLY} (NVFP4WeightOnlyConfig), or to fp8 per row",
        )


#: class of the weight -> its input's rounding, None where there is none
ROUNDINGS: Mapping[str, Callable[[Described], Rounding | None]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "MXTensor": _none,
    "NVFP4Tensor": _none,
}
