"""Strict JSON from somebody else: RFC 8259, unique keys, finite numbers, bounded size and depth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exporters.errors import ConfigError
from exporters.safe_files import read_bytes

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64
# Possessive, closing quote optional: linear time on any text, an unterminated string included.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_NUMBER_DIGITS = 400  # json would build an integer of any length, in quadratic time


def _check_depth(text: str, where: str) -> None:
    """Refuse deep nesting before the recursive parser meets it."""
    depth = 0
    for mark in _STRING_OR_BRACKET.finditer(text):
        if mark.group() in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ConfigError(f"JSON nested deeper than {MAX_JSON_DEPTH} levels", where=where, way_out="Flatten it")
        elif mark.group() in "]}":
            depth -= 1


def parse_json(data: bytes, where: str) -> Any:
    """Parse strict JSON (RFC 8259): UTF-8 without BOM, unique keys, finite numbers, bounded depth.

    Raises ConfigError naming `where` and the key or position.
    """

    def pairs(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise ConfigError(f"the key {key[:100]!r} appears twice", where=where, way_out="Keep one of them")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise ConfigError(f"{name} is not JSON", where=where, way_out="Use a finite number or null")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ConfigError(f"the number {text[:40]} is not finite", where=where, way_out="Use a finite number")
        return value

    def integer(text: str) -> int:
        if len(text) > _NUMBER_DIGITS:
            raise ConfigError(f"a number of {len(text)} digits", where=where, way_out="Use a number of sensible size")
        return int(text)

    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError("starts with a byte-order mark", where=where, way_out="Save it as UTF-8 without BOM")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", where=where, way_out="Save it as UTF-8") from error
    _check_depth(text, where)
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=integer)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"is not JSON ({error.msg}, line {error.lineno} column {error.colno})", where=where, way_out="Correct it"
        ) from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a file that must hold one JSON object, strictly; see `parse_json`."""
    value = parse_json(read_bytes(path, limit), str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"holds a JSON {type(value).__name__}, not an object", where=str(path), way_out="Correct it")
    return value
