"""`raises`: pytest.raises for errors of our own, each of which must say what, where and the way out.

What it catches makes the error catalogue (tools/error_catalogue.py), and is compared with the line that stands there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tools.error_catalogue import CATALOGUE, Refusal, refusal

#: What was caught in this run.
REFUSALS: list[Refusal] = []
#: Where it is written to at the end (option --refusals).
making: Path | None = None


@contextmanager
def raises(
    kind: type[Exception] | tuple[type[Exception], ...], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """As pytest.raises."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    error = caught.value
    for part, meaning in (("what", "fact"), ("where", "place"), ("way_out", "way out")):
        assert getattr(error, part), f"names no {meaning}: {error!r}"
    found = refusal(os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0], error)
    REFUSALS.append(found)
    section = _catalogue().get(found.area, "")
    if f"\n| {found.given} |" in section:
        assert found.row in section, "exporters/ERRORS.md says otherwise: python -m tools.error_catalogue"


@cache
def _catalogue() -> dict[str, str]:
    """Area -> its lines in the catalogue; nothing while it is made anew."""
    text = CATALOGUE.read_text("utf-8") if making is None and CATALOGUE.exists() else ""
    return {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
