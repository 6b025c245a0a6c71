"""report.json of a bundle: gate results, the environment they were measured in, and latency tables.

    {"schema": 1,
     "results": [{component, backend, form, mode, gate, metric, value, limit, limit_source, status, where}, ...],
     "environment": {...}, "latency": [{component, backend, form, mode, metric, value, unit, status, where}, ...],
     "quantisation": [{name, stored, bytes, kl}, ...]}

Results from several runs merge: a row replaces the one with the same key (everything that says what was measured).
`value` is null when nothing was measured, so a number is never there for what did not run. report.md is the same as
a readable table. Both are mutable files of the bundle: they are no part of its hashes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from runtimes.errors import Fault
from runtimes.files import storage_errors, write_durably
from runtimes.matrix import parity_matrix

SCHEMA = 1
REPORT_JSON, REPORT_MD = "report.json", "report.md"
Status = Literal["passed", "failed", "proxy", "pending-device"]
_STYLE = {"passed": "green", "failed": "bold red", "proxy": "yellow", "pending-device": "cyan", "invalid": "bold red"}


class ReportError(Fault):
    """A report.json that cannot be read."""


@dataclass(frozen=True)
class Result:
    """One gate's outcome. `metric` carries a modality after a slash where there is one ("mean_kl/image").

    `where` says what was compared, and for a failure the place of the first divergence.
    """

    component: str
    backend: str
    form: str
    mode: str
    gate: str
    metric: str
    value: float | None
    limit: float | None
    limit_source: str
    status: Status
    where: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.component, self.backend, self.form, self.mode, self.gate, self.metric


@dataclass(frozen=True)
class Latency:
    """One measured figure. With status "invalid" (the reason is in `where`) it is no figure to use."""

    component: str
    backend: str
    form: str
    mode: str
    metric: str
    value: float
    unit: str
    status: Literal["valid", "invalid"]
    where: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.component, self.backend, self.form, self.mode, self.metric


@dataclass(frozen=True)
class Matrix:
    """One matrix that the build quantised, or several that one product joins: how it is stored ("int4 g32", "float"),
    its size, and what it costs alone at the width asked for (mean KL divergence in nats; None where that was not
    measured)."""

    name: str
    stored: str
    bytes: int
    kl: float | None


@dataclass(frozen=True)
class Report:
    """What a report.json holds."""

    results: tuple[Result, ...] = ()
    environment: Mapping[str, Any] | None = None
    latency: tuple[Latency, ...] = ()
    quantisation: tuple[Matrix, ...] = ()

    def merged(
        self,
        results: Iterable[Result] = (),
        latency: Iterable[Latency] = (),
        environment: Mapping[str, Any] | None = None,
    ) -> Report:
        """This report with the given rows added, each in the place of the row with its key."""
        rows = {row.key: row for row in (*self.results, *results)}
        figures = {row.key: row for row in (*self.latency, *latency)}
        return Report(
            tuple(rows[key] for key in sorted(rows)),
            {**(self.environment or {}), **(environment or {})},
            tuple(figures[key] for key in sorted(figures)),
            self.quantisation,
        )

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results that fail their gate."""
        return tuple(result for result in self.results if result.status == "failed")


def read_report(folder: Path) -> Report:
    """The bundle's report, empty when it has none yet. Raises ReportError for a file that is not one."""
    path = folder / REPORT_JSON
    if not path.exists():
        return Report()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']}, expected {SCHEMA}")
        results = tuple(Result(**row) for row in raw["results"])
        latency = tuple(Latency(**row) for row in raw["latency"])
        quantisation = tuple(Matrix(**row) for row in raw.get("quantisation", ()))
        return Report(results, dict(raw["environment"]), latency, quantisation)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"is not a report ({error})", str(path), "Remove it; it is written again") from error


def write_report(folder: Path, report: Report) -> None:
    """Writes report.json and report.md, each whole or not at all. Raises BundleError when the disk refuses."""
    content = {
        "schema": SCHEMA,
        "results": [asdict(row) for row in report.results],
        "environment": dict(report.environment or {}),
        "latency": [asdict(row) for row in report.latency],
        "quantisation": [asdict(row) for row in report.quantisation],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with storage_errors(folder):
        write_durably(folder / REPORT_JSON, text.encode())
        write_durably(folder / REPORT_MD, markdown(report).encode())


RESULT_COLUMNS = ("component", "artifact", "gate", "metric", "value", "limit", "limit from", "status", "where")
LATENCY_COLUMNS = ("component", "artifact", "metric", "value", "unit", "status", "where")
MATRIX_COLUMNS = ("matrix", "stored as", "kB", "mean KL alone")


def result_cells(row: Result) -> tuple[str, ...]:
    """One line of the results table, by RESULT_COLUMNS."""
    artifact = f"{row.backend}/{row.form}/{row.mode}"
    numbers = (number(row.value), number(row.limit))
    return row.component, artifact, row.gate, row.metric, *numbers, row.limit_source, row.status, row.where


def latency_cells(row: Latency) -> tuple[str, ...]:
    """One line of the latency table, by LATENCY_COLUMNS."""
    artifact = f"{row.backend}/{row.form}/{row.mode}"
    return row.component, artifact, row.metric, number(row.value), row.unit, row.status, row.where


def matrix_cells(row: Matrix) -> tuple[str, ...]:
    """One line of the table of what the build quantised, by MATRIX_COLUMNS."""
    return row.name, row.stored, f"{row.bytes / 1e3:,.1f}", number(row.kl)


def number(value: float | None) -> str:
    """Four significant digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.4g}"


def markdown(report: Report) -> str:
    """report.md: the tables and the environment."""
    parts = ["# Report\n", "## All backends\n", parity_matrix({"this device": report.results}), "\n## Gates\n"]
    parts.append(_table(RESULT_COLUMNS, [result_cells(row) for row in report.results]))
    if report.latency:
        parts += ["\n## Latency\n", _table(LATENCY_COLUMNS, [latency_cells(row) for row in report.latency])]
    if report.quantisation:
        parts += ["\n## Quantised by the build\n"]
        parts.append(_table(MATRIX_COLUMNS, [matrix_cells(row) for row in report.quantisation]))
    if report.environment:
        rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(report.environment.items())]
        parts += ["\n## Environment\n", _table(("what", "value"), rows)]
    return "\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_report(report: Report) -> None:
    """The tables on the console, without the columns that only a file has room for; below them, each row that is not
    plainly good with its `where` (report.md has them all)."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Into a file or a pipe there is no width to keep to.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    tables: tuple[tuple[str, tuple[str, ...], list[tuple[tuple[str, ...], str]]], ...] = (
        ("Results", RESULT_COLUMNS, [(result_cells(row), row.status) for row in report.results]),
        ("Latency", LATENCY_COLUMNS, [(latency_cells(row), row.status) for row in report.latency]),
        ("Quantised by the build", MATRIX_COLUMNS, [(matrix_cells(row), "") for row in report.quantisation]),
    )
    for title, columns, rows in tables:
        if not rows:
            continue
        shown = [i for i, column in enumerate(columns) if column not in ("limit from", "where")]
        table = Table(*(columns[i] for i in shown), title=title, title_justify="left")
        for cells, status in rows:
            table.add_row(*(escape(cells[i]) for i in shown), style=_STYLE.get(status))
        console.print(table)
        noted = [(cells, status) for cells, status in rows if status in _NOTED]
        # Every timing of an artifact is invalid for the same reason; the gates of one fail each for its own.
        named = 2 if rows is tables[1][2] else 4
        for cells, status in {row[0][:named]: row for row in noted}.values():
            console.print(escape(f"{status}: {' '.join(cells[:named])}: {cells[-1]}"))


_NOTED = ("failed", "pending-device", "invalid")
