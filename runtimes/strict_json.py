"""Strict reading of JSON that came from outside: every access checks and names its field. Standard library only.

`where` is the path of the object that holds the key, ending in a dot (or empty), so that an error can name the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from runtimes.manifest import AGAIN, BundleError

T = TypeVar("T")
_NAMES = {
    int: "an integer",
    str: "a string",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def refuse(where: str, what: str, way_out: str = AGAIN) -> BundleError:
    """The error to raise for the field `where`."""
    return BundleError(what, where, way_out)


def get(obj: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """obj[key] of type `kind` (an int also passes as a float; a bool never passes as a number)."""
    if key not in obj:
        raise refuse(f"{where}{key}", "is missing")
    value = obj[key]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise refuse(f"{where}{key}", f"must be {_NAMES[kind]}, not {type(value).__name__}")
    return value  # type: ignore[return-value]


def optional(obj: Mapping[str, Any], key: str, kind: type[T], where: str) -> T | None:
    """As `get`, but null (the key itself must be there) gives None."""
    return None if key in obj and obj[key] is None else get(obj, key, kind, where)


def count(obj: Mapping[str, Any], key: str, where: str, low: int = 0) -> int:
    """An integer that is at least `low`."""
    value = get(obj, key, int, where)
    if not low <= value < 1 << 62:
        raise refuse(f"{where}{key}", f"{value} is out of range (at least {low})")
    return value


def text(obj: Mapping[str, Any], key: str, where: str) -> str:
    """A string that is not blank."""
    value = get(obj, key, str, where)
    if not value.strip():
        raise refuse(f"{where}{key}", "is empty")
    return value


def items(obj: Mapping[str, Any], key: str, where: str, each: Callable[[Any, str], T]) -> tuple[T, ...]:
    """A list as a tuple, each element read by `each(value, where)`."""
    values = get(obj, key, list, where)
    return tuple(each(value, f"{where}{key}[{i}]") for i, value in enumerate(values))


def typed(kind: type[T]) -> Callable[[Any, str], T]:
    """For `items`: takes elements of one type as they are."""

    def check(value: Any, where: str) -> T:
        return get({"": value}, "", kind, where)

    return check


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj: dict[str, Any] = {}
    for key, value in pairs:
        if key in obj:
            raise ValueError(f"key {key!r} is there twice")
        obj[key] = value
    return obj


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """Strict JSON object: UTF-8 without a mark, no key twice, no NaN or infinity, no runaway nesting."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON ({error})"
        raise refuse(where, reason) from error
    if not isinstance(value, dict):
        raise refuse(where, "must be a JSON object")
    return value
