"""Which modules a name, pattern or class of a quantization_config means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from exporters.formats.scheme import refuse

#: Ranks of a match, the best first; a target that does not match has the last.
EXACT, PATTERN, CLASS, NONE = range(4)


def names(value: Any, at: str) -> list[str]:
    """A list of module names, class names and "re:" patterns; [] for none."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and 0 < len(item) <= 400 for item in value):
        refuse("is not a list of names", at, "Give module names, class names or re: patterns")
    for item in value:
        if item.startswith("re:"):
            check_pattern(item[3:], at)
    return value


def check_pattern(pattern: str, at: str) -> None:
    """Refuse a pattern whose matching time is not bounded by a small power of the name's length."""
    try:
        re.compile(pattern)
    except re.error as error:
        refuse(f"the pattern {pattern!r:.400} does not compile ({error})", at, "Correct it")
    # A quantified group, a back-reference, many repeats or many alternatives can take exponential time.
    repeats = len(re.findall(r"(?<![\\(])[*+?{]", pattern))
    if repeats > 3 or pattern.count("|") > 12 or re.search(r"\)[*+?{]|\\[1-9]|\(\?P=", pattern):
        refuse(f"the pattern {pattern!r:.400} could take unbounded time", at, "Write simpler patterns, or names")


def rank(name: str, classes: Iterable[str], target: str) -> int:
    """How well a target of compressed-tensors matches (compressed_tensors.utils.match)."""
    if target.startswith("re:"):
        return PATTERN if re.match(target[3:], name) else NONE
    return EXACT if target == name else CLASS if target in classes else NONE


def excluded(name: str, keys: Iterable[str], at: str) -> bool:
    """Whether modules_to_not_convert means ``name`` (transformers.quantizers.quantizers_utils.should_convert_module).

    A key matches from the name's start up to a module's boundary, as a regular expression too, or as a suffix.
    """
    for key in keys:
        check_pattern(key, at)
        if re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key):
            return True
    return False
