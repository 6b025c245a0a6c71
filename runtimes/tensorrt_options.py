"""What a TensorRT artifact says of itself in the manifest, checked field by field. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtimes.manifest import Artifact, BundleError
from runtimes.strict_json import get

Shape = tuple[int, ...]
RTX = "rtx"
_AGAIN = "Fetch or build the bundle again"
_STATES = ("aliased", "delta")


@dataclass(frozen=True)
class Head:
    """Tensors of a head that picks by itself: the rows to look at, and the ``k`` best of them."""

    rows: str
    values: str
    ids: str
    k: int


@dataclass(frozen=True)
class Options:
    """The options of a TensorRT artifact.

    Attributes:
        generation: of the parser, "10.3" .. "11", or "rtx" for TensorRT-RTX.
        sm: compute capability, as in "sm_87".
        plugins: op types that only our plugins compute.
        delta: the states' outputs are the new rows alone; else each is its input's memory.
        ranges: name of a shape range -> input -> its smallest, usual and largest shape. Where there are states the
            first is for one token, the last for more.
        engine: the file of the bundle that is an engine already.
    """

    generation: str
    sm: str
    plugins: tuple[str, ...]
    delta: bool
    ranges: Mapping[str, Mapping[str, tuple[Shape, Shape, Shape]]]
    head: Head | None
    engine: str | None


def options_of(artifact: Artifact) -> Options:
    """Reads the options. Raises BundleError naming the field that does not fit."""
    raw, where = artifact.options, f"{artifact.component} ({artifact.label}): options."
    plugins = raw.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise BundleError("must be a list of names", f"{where}plugins", _AGAIN)
    states = raw.get("states", _STATES[0])
    if states not in _STATES:
        raise BundleError(f"must be one of {', '.join(_STATES)}", f"{where}states", _AGAIN)
    engine = get(raw, "engine", str, where) if "engine" in raw else None
    return Options(
        get(raw, "generation", str, where),
        get(raw, "sm", str, where),
        tuple(plugins),
        states == "delta",
        _ranges(artifact, where),
        _head(raw["head"], where) if raw.get("head") is not None else None,
        engine,
    )


def _ranges(artifact: Artifact, where: str) -> dict[str, dict[str, tuple[Shape, Shape, Shape]]]:
    found = {}
    for name, inputs in get(artifact.options, "ranges", dict, where).items():
        place = f"{where}ranges.{name}"
        if not isinstance(inputs, dict):
            raise BundleError("must be an object", place, _AGAIN)
        found[name] = {key: _shapes(value, f"{place}.{key}") for key, value in inputs.items()}
        if artifact.states and len(found[name].get("ids", ((),))[0]) != 2:
            raise BundleError("needs shapes [batch, tokens]", f"{place}.ids", _AGAIN)
    if not found:
        raise BundleError("needs one range at least", f"{where}ranges", _AGAIN)
    return found


def _shapes(raw: Any, where: str) -> tuple[Shape, Shape, Shape]:
    if not isinstance(raw, list) or len(raw) != 3 or not all(isinstance(shape, list) for shape in raw):
        raise BundleError("must be the smallest, usual and largest shape", where, _AGAIN)
    if any(type(size) is not int or not 0 < size < 1 << 31 for shape in raw for size in shape):
        raise BundleError("sizes must be positive integers", where, _AGAIN)
    least, usual, most = (tuple(shape) for shape in raw)
    if not len(least) == len(usual) == len(most) or any(
        not a <= b <= c for a, b, c in zip(least, usual, most, strict=True)
    ):
        raise BundleError("must not fall from the smallest to the largest shape", where, _AGAIN)
    return least, usual, most


def _head(raw: Any, where: str) -> Head:
    if not isinstance(raw, dict):
        raise BundleError("must be an object", f"{where}head", _AGAIN)
    rows, values, ids = (get(raw, name, str, f"{where}head.") for name in ("rows", "values", "ids"))
    k = get(raw, "k", int, f"{where}head.")
    if k < 1:
        raise BundleError("must be at least 1", f"{where}head.k", _AGAIN)
    return Head(rows, values, ids, k)
