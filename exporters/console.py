"""What the build prints: progress with stage and bytes, the device list, predictions, and the closing table."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from device_profiles.schema import Profile

if TYPE_CHECKING:
    from exporters.plan import Entry, Forecast
    from runtimes.bundle import Artifact, Bundle
    from runtimes.report import Latency, Report, Result

STYLE = {"passed": "green", "failed": "bold red", "proxy": "yellow", "pending-device": "cyan"}
#: Marks a figure that was measured on a busy or unsteady machine.
UNUSABLE = " !"
#: Lines of the table of quantised matrices that the console shows; report.md has them all.
LONGEST_TABLE = 40
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(count: float | None) -> str:
    """A byte count for reading; "unknown" for None."""
    if count is None:
        return "unknown"
    for factor, unit in UNITS:
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


class Bar:
    """Shows a stage, the bytes that it has dealt with, of how many where that is known, their rate and the time."""

    def __init__(self, display: Progress) -> None:
        self._display, self._stage = display, ""
        self._task = display.add_task("start", total=None)
        self._totals: dict[str, int] = {}

    def expect(self, stage: str, total: int) -> None:
        """The bytes of a stage that is about to begin."""
        self._totals[stage] = total

    def __call__(self, stage: str, size: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._display.remove_task(self._task)  # a task that has a total cannot go back to having none
            self._task = self._display.add_task(escape(stage), total=self._totals.get(stage))
        self._display.update(self._task, advance=size)


@contextmanager
def progress() -> Iterator[Bar]:
    """A bar on standard error, to be called with (stage, bytes).

    Where standard error is no terminal nothing is shown: rich would leave an empty line there.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        yield Bar(display)


def error(problem: Exception) -> None:
    """One message on standard error."""
    print(f"error: {problem}", file=sys.stderr)


def print_profiles(profiles: Iterable[Profile]) -> None:
    """The devices with what matters most of each."""
    table = Table(title="Profiles", title_justify="left")
    for column in ("profile", "device", "memory", "bandwidth", "backends in order"):
        table.add_column(column, no_wrap=column == "profile")  # the name is what one types
    for profile in profiles:
        bandwidth = profile.bandwidth_bytes_per_s
        table.add_row(
            profile.name,
            escape(profile.device),
            size(profile.memory_bytes),
            f"{size(bandwidth)}/s" if bandwidth else "unknown",
            ", ".join(profile.backends),
        )
    Console().print(table)


def print_forecast(profile: Profile, forecast: Forecast, entries: Iterable[Entry]) -> None:
    """What a build would make, and the sizes and speed predicted for it."""
    plan = Table("component", "artifact", "plan", title=f"Plan for {profile.title}", title_justify="left")
    for entry in entries:
        plan.add_row(
            entry.component, entry.label, escape(entry.left_out or "build"), style="dim" if entry.left_out else None
        )
    rate = forecast.tokens_per_second
    figures = Table("predicted", "value", "budget", title="Prediction (not a measurement)", title_justify="left")
    figures.add_row("bundle", size(forecast.bundle_bytes), size(profile.bundle_bytes))
    figures.add_row("memory of the process", size(forecast.memory_bytes), size(profile.rss_bytes))
    figures.add_row("bytes per token", size(forecast.bytes_per_token), "")
    figures.add_row(
        "tokens/s at the bandwidth roof",
        f"{rate:,.0f}" if rate else "unknown: the profile has no bandwidth",
        f"{1e3 / profile.tpot_ms:,.0f}",
    )
    Console().print(plan, figures)


def print_summary(bundle: Bundle, report: Report, reused: bool) -> None:
    """One line per artifact with its worst status and its speed, what was left out, and where everything is."""
    table = Table(
        title_justify="left", title=f"{bundle.student.name} {bundle.student.version} for {bundle.profile['title']}"
    )
    for column in ("component", "artifact", "size", "gates", "speed"):
        table.add_column(column, no_wrap=True)
    for artifact in bundle.artifacts:
        rows = [row for row in report.results if _is_of(row, artifact) and row.gate != "budget"]
        status = next((s for s in ("failed", "pending-device", "proxy") if any(r.status == s for r in rows)), "passed")
        held = sum(row.status != "failed" for row in rows)
        bytes_ = sum(bundle.files[path].size for path in artifact.files)
        table.add_row(
            artifact.component,
            artifact.label + (" *" if artifact.preferred else ""),
            size(bytes_),
            f"{status} {held}/{len(rows)}" if rows else "pending-device",
            _speed(report, artifact),
            style=STYLE[status],
        )
    missing = sorted(
        {entry.split("/")[0] for rows in bundle.profile["components"].values() for entry in rows}
        - {artifact.backend for artifact in bundle.artifacts}
    )
    console = Console()
    console.print(table)
    inherited = bundle.inheritance
    if inherited["total"]:
        console.print(
            f"Inheritance: {inherited['identical']} of {inherited['total']} codes, scales and zero points "
            "read back identical."
        )
    if report.quantisation:
        _print_quantisation(console, bundle, report)
    states = next((a.states for a in bundle.artifacts if a.states), ())
    if any(state.dtype == "int8" for state in states):
        codes = sum(math.prod(state.shape) for state in states)
        console.print(f"KV cache: int8, {size(codes)} for {bundle.context} tokens (float32: {size(4 * codes)}).")
    if lost := [row for row in report.failed if row.backend == "torch"]:
        worst = ", ".join(f"{row.metric} {row.value:.3g} (limit {row.limit:.3g})" for row in lost)
        console.print(
            f"The quantised student is further from the float one than the profile wishes: {worst}. "
            "This is the student's, not the export's.",
            style="yellow",
        )
    if any(row.status != "valid" for row in report.latency):
        console.print(
            f"{UNUSABLE.strip()} marks figures of a busy or unsteady machine: not to be used (report.md says why)."
        )
    if any(row.gate == "budget" and row.status == "failed" for row in report.results):
        console.print("A budget of the profile is exceeded (see the budget rows of report.md).", style="yellow")
    if missing:
        console.print(f"Not made here: {', '.join(missing)} (the profile names them, --backends does not).")
    console.print(
        f"{'Unchanged, reused' if reused else 'Published'}: {bundle.folder}  (* preferred; details in report.md)"
    )


def _print_quantisation(console: Console, bundle: Bundle, report: Report) -> None:
    """What the build quantised: every matrix of a small student; of a large one what each width adds up to."""
    held = bundle.quantisation
    loss = "not measured" if held["measured_kl"] is None else f"{held['measured_kl']:.3g} nats"
    budget = "" if held["mean_kl"] is None else f" of {held['mean_kl']:g} allowed"
    source = f" ({held['calibration']})" if held["calibration"] else ""
    console.print(f"Quantised by this build: {held['name']}, mean KL against the float student {loss}{budget}{source}.")
    if len(report.quantisation) <= LONGEST_TABLE:
        table = Table("matrix", "stored as", "kB", "mean KL alone")
        for row in report.quantisation:
            alone = "-" if row.kl is None else f"{row.kl:.3g}"
            table.add_row(escape(row.name), row.stored, f"{row.bytes / 1e3:,.1f}", alone)
    else:
        table = Table("stored as", "matrices", "kB")
        for stored in dict.fromkeys(row.stored for row in report.quantisation):
            rows = [row for row in report.quantisation if row.stored == stored]
            table.add_row(stored, str(len(rows)), f"{sum(row.bytes for row in rows) / 1e3:,.1f}")
    console.print(table)


def _is_of(row: Result | Latency, artifact: Artifact) -> bool:
    """Whether a row of the report is about an artifact."""
    names = ("component", "backend", "form", "mode")
    return all(getattr(row, name) == getattr(artifact, name) for name in names)


def _speed(report: Report, artifact: Artifact) -> str:
    figures = {row.metric: row for row in report.latency if _is_of(row, artifact)}
    for metric, unit in (("tokens_per_second", "tok/s"), ("latency_p50", "ms")):
        if metric in figures:
            row = figures[metric]
            return f"{row.value:,.{0 if unit == 'tok/s' else 2}f} {unit}" + ("" if row.status == "valid" else UNUSABLE)
    return "-"
