"""All backends of one student in one table: rows are components and metrics, columns backends.

A cell has a line per artifact: its form and mode, the value, the limit with the letter of where that comes from, and
the status. Sources stand below the table, one letter each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from runtimes.metrics import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from runtimes.report import Result

GATE = "export"
#: Metrics whose distance from 1 is what counts.
_SHARES = ("same_top", "ssim", "codes_equal")


def parity_matrix(reports: Mapping[str, Iterable[Result]]) -> str:
    """A Markdown table of the export gates of one student's bundles.

    Args:
        reports: name of the profile -> its results; where there are several, a line names the profile it is from.
    """
    rows = [(profile, row) for profile, results in reports.items() for row in results if row.gate.startswith(GATE)]
    backends = list(dict.fromkeys(row.backend for _, row in rows))
    letters: dict[str, str] = {}
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for profile, row in rows:
        line = _line(row, letters.setdefault(row.limit_source, _letter(len(letters))))
        label = f"{line} on {profile}" if len(reports) > 1 else line
        cells.setdefault((row.component, row.metric), {}).setdefault(row.backend, []).append(label)
    lines = ["| component | metric | " + " | ".join(backends) + " |", "| --- " * (len(backends) + 2) + "|"]
    for (component, metric), found in cells.items():
        columns = ("<br>".join(found.get(backend, ())) for backend in backends)
        lines.append(f"| {component} | {metric} | " + " | ".join(columns) + " |")
    sources = [f"- {letter}: {source}" for source, letter in letters.items()]
    return "\n".join([*lines, "", "Limits come from:", "", *sources])


def _line(row: Result, letter: str) -> str:
    digits = 6 if row.metric in _SHARES else 3
    value = "not run" if row.value is None else f"{row.value:.{digits}g}"
    if row.limit is None:
        return f"`{row.form}/{row.mode}` {value}: {row.status}"
    sign = "≥" if row.metric in HIGHER_IS_BETTER else "≤"
    return f"`{row.form}/{row.mode}` {value} ({sign} {row.limit:.{digits}g} {letter}): {row.status}"


def _letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    first, last = divmod(index, 26)
    return (chr(96 + first) if first else "") + chr(97 + last)
