"""What a discretizer's config.json must say, and that it agrees with the modality table.

A discretizer turns a signal into codes and back. One row per class; a new class is a new row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from exporters.errors import ConfigError, PackageError
from exporters.remote_code import refuse_remote_code

_OURS = ("preprocessing", "student_version")


def _whole(value: Any, where: str, most: int = 1 << 20) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ConfigError(f"{value!r} is not a whole number from 1 to {most}", where=where, way_out="Correct it")
    return value


def _numbers(value: Any, count: int, where: str) -> list[float]:
    good = isinstance(value, list) and len(value) == count
    if not good or any(isinstance(item, bool) or not isinstance(item, int | float) for item in value):
        raise ConfigError(f"{value!r} is not a list of {count} numbers", where=where, way_out="Correct it")
    return [float(item) for item in value]


def _exact_keys(table: Any, keys: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError("is missing or not an object", where=where, way_out=f"It holds {', '.join(sorted(keys))}")
    if set(table) != keys:
        odd = sorted(set(table) ^ keys)
        raise ConfigError(
            f"missing or unknown: {', '.join(odd)}", where=where, way_out=f"It holds exactly {', '.join(sorted(keys))}"
        )
    return table


def _agree(found: Any, wanted: Any, what: str, where: str) -> None:
    if found != wanted:
        raise PackageError(
            f"{what} is {found!r}, the modality table in package.json says {wanted!r}",
            where=where,
            way_out="Take the discretizer and the table from one release",
        )


def _check_image(config: Mapping[str, Any], where: str, codebooks: int, size: int, grid: tuple[int, ...]) -> None:
    _agree(config.get("num_vq_embeddings"), size, "num_vq_embeddings", where)
    _agree(1, codebooks, "the number of codebooks of a VQModel", where)
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise ConfigError("block_out_channels is not a list of 1 to 16 widths", where=where, way_out="Correct it")
    at = f"{where}: preprocessing"
    table = _exact_keys(config.get("preprocessing"), {"size", "channels", "mean", "std"}, at)
    channels = _whole(table["channels"], f"{at}.channels", 16)
    _agree(channels, config.get("in_channels"), "preprocessing.channels against in_channels", where)
    _numbers(table["mean"], channels, f"{at}.mean")
    if any(value <= 0 for value in _numbers(table["std"], channels, f"{at}.std")):
        raise ConfigError("std must be positive", where=f"{at}.std", way_out="Correct it")
    shape = _numbers(table["size"], 2, f"{at}.size")
    downsample = 2 ** (len(blocks) - 1)
    if any(_whole(side, f"{at}.size") % downsample for side in table["size"]):
        raise ConfigError(f"size is not a multiple of {downsample}", where=f"{at}.size", way_out="Correct it")
    _agree(tuple(int(side) // downsample for side in shape), grid, "the grid of codes (size / downsampling)", where)


def _check_audio(config: Mapping[str, Any], where: str, codebooks: int, size: int, grid: tuple[int, ...]) -> None:
    _agree(config.get("codebook_size"), size, "codebook_size", where)
    _agree(config.get("n_codebooks"), codebooks, "n_codebooks", where)
    ratios = config.get("downsampling_ratios")
    if not isinstance(ratios, list) or not 1 <= len(ratios) <= 16:
        raise ConfigError("downsampling_ratios is not a list of 1 to 16 factors", where=where, way_out="Correct it")
    hop = math.prod(_whole(ratio, f"{where}: downsampling_ratios", 1024) for ratio in ratios)
    at = f"{where}: preprocessing"
    table = _exact_keys(config.get("preprocessing"), {"sample_rate", "samples", "channels", "peak"}, at)
    rate = _whole(table["sample_rate"], f"{at}.sample_rate")
    _agree(rate, config.get("sampling_rate"), "preprocessing.sample_rate against sampling_rate", where)
    _agree(_whole(table["channels"], f"{at}.channels", 1), 1, "the number of channels of a DacModel", where)
    peak = table["peak"]
    if isinstance(peak, bool) or not isinstance(peak, int | float) or not 0 < peak <= 1:
        raise ConfigError(f"peak is {peak!r}", where=f"{at}.peak", way_out="Give a number above 0, at most 1")
    samples = _whole(table["samples"], f"{at}.samples", 1 << 28)
    _agree((samples, codebooks), (math.prod(grid[:1]) * hop, grid[-1] if len(grid) > 1 else 1), "samples", where)


_Check = Callable[[Mapping[str, Any], str, int, int, tuple[int, ...]], None]
# Key: the name under which the class writes itself into its config.json.
DISCRETIZERS: Mapping[str, _Check] = {"VQModel": _check_image, "dac": _check_audio}


def discretizer_kind(config: Mapping[str, Any], where: str) -> str:
    """The class, "VQModel" or "dac", from "_class_name" (diffusers) or "model_type" (transformers)."""
    kind = config.get("_class_name", config.get("model_type"))
    if not isinstance(kind, str) or kind not in DISCRETIZERS:
        raise ConfigError(
            f"unknown discretizer {kind!r}",
            where=where,
            way_out=f"Supported: {', '.join(sorted(DISCRETIZERS))} (_class_name or model_type)",
        )
    return kind


def check_discretizer_config(
    config: Mapping[str, Any], where: str, codebooks: int, codebook_size: int, grid: tuple[int, ...]
) -> None:
    """Refuse a discretizer whose codebooks, grid or preprocessing disagree with the modality table."""
    refuse_remote_code(config, where)
    DISCRETIZERS[discretizer_kind(config, where)](config, where, codebooks, codebook_size, grid)


def library_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without this package's own keys, as the class that reads it expects."""
    return {key: value for key, value in config.items() if key not in _OURS}
