"""config.json's quantization_config -> a WeightScheme per module.

Only weight-only integer schemes of compressed-tensors are carried over so far; everything else is refused by name.
Matching follows compressed_tensors.utils.match: exact module name first, then "re:" patterns, then class names; a
module that `ignore` matches stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from exporters.compressed_tensors_ import FORMATS, WeightScheme
from exporters.errors import QuantizationError
from exporters.quantized import BITS

_METHOD = "compressed-tensors"
_WHERE = "config.json: quantization_config"


def _refuse(what: str, at: str = "", way_out: str = "") -> NoReturn:
    supported = f"Supported: {_METHOD} weight-only int{BITS[0]}/int{BITS[1]} as {', '.join(FORMATS)}"
    raise QuantizationError(what, where=f"{_WHERE}{at}", way_out=way_out or supported)


def _scheme(group: Any, at: str, default_format: Any) -> WeightScheme:
    if not isinstance(group, dict):
        _refuse(f"is {group!r:.100}", at, "Write the scheme out: targets and weights")
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            _refuse(f"{part} are quantised", at)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        _refuse("has no weights", at)
    form = group.get("format") or default_format
    if form not in FORMATS:
        _refuse(f"unknown format {form!r}", at)
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if kind != "int" or isinstance(bits, bool) or bits not in BITS:
        _refuse(f"weights are {kind!r} of {bits!r} bits", at)
    symmetric = weights.get("symmetric")
    if not isinstance(symmetric, bool):
        _refuse("does not state whether weights are symmetric", at, 'Write "symmetric": true or false')
    if weights.get("dynamic"):
        _refuse("weights are quantised dynamically", at)
    if weights.get("actorder") in ("group", "dynamic", True):
        _refuse(f"actorder {weights['actorder']!r} (g_idx)", at)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("tensor", "channel", "group"):
        _refuse(f"strategy {strategy!r}", at, "Supported strategies: tensor, channel, group")
    if strategy == "group" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        _refuse(f"group_size is {size!r}", at, "Give a positive whole number")
    if strategy == "tensor" and form == "pack-quantized" and not symmetric:
        _refuse("pack-quantized has no form for an asymmetric per-tensor zero point", at)
    return WeightScheme(form, bits, symmetric, size if strategy == "group" else None, strategy == "tensor")


def _names(value: Any, at: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and 0 < len(item) <= 400 for item in value):
        _refuse("is not a list of names", at, "Give module names, class names or re: patterns")
    for item in value:
        if item.startswith("re:"):
            _check_pattern(item[3:], at)
    return value


def _check_pattern(pattern: str, at: str) -> None:
    """Refuse a pattern whose matching time is not bounded by a small power of the name's length."""
    try:
        re.compile(pattern)
    except re.error as error:
        _refuse(f"the pattern {pattern!r} does not compile ({error})", at, "Correct it")
    # A quantified group, a back-reference, many repeats or many alternatives can take exponential time.
    repeats = len(re.findall(r"(?<![\\(])[*+?{]", pattern))
    if repeats > 3 or pattern.count("|") > 12 or re.search(r"\)[*+?{]|\\[1-9]|\(\?P=", pattern):
        _refuse(f"the pattern {pattern!r} could take unbounded time", at, "Write simpler patterns, or names")


def _validated_groups(config: Any) -> list[tuple[list[str], WeightScheme]]:
    if not isinstance(config, dict):
        _refuse(f"is {config!r:.80}, not an object")
    method = config.get("quant_method")
    if method != _METHOD:
        _refuse(f"unsupported quant_method {method!r}")
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
        scheme = _scheme(group, at, None if form == "mixed-precision" else form)
        result.append((_names(group.get("targets"), f"{at}.targets"), scheme))
    return result


def _matches(name: str, classes: Iterable[str], target: str) -> int:
    """0 exact name, 1 pattern, 2 class, 3 no match; the order in which schemes win."""
    if target.startswith("re:"):
        return 1 if re.match(target[3:], name) else 3
    return 0 if target == name else 2 if target in classes else 3


def module_schemes(config: Any, modules: Mapping[str, tuple[str, ...]]) -> dict[str, WeightScheme]:
    """The scheme of every quantised module.

    Args:
        config: the parsed quantization_config.
        modules: name -> class names (most derived first) of every Linear and Embedding of the model.
    """
    groups = _validated_groups(config)
    ignore = _names(config.get("ignore"), ".ignore")
    result = {}
    for name, classes in modules.items():
        if any(_matches(name, classes, item) < 3 for item in ignore):
            continue
        ranked = [
            (_matches(name, classes, target), index, scheme)
            for index, (targets, scheme) in enumerate(groups)
            for target in targets
        ]
        best = min((item[:2] for item in ranked), default=(3, 0))
        if best[0] < 3:
            result[name] = next(scheme for rank, index, scheme in ranked if (rank, index) == best)
    return result
