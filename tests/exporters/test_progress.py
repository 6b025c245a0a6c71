"""Progress in bytes: what a bar is told, and what it shows on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from device_profiles import load_profile
from exporters import inheritance, stages
from exporters.console import Bar
from exporters.progress import begin


class Told:
    """A callback that keeps what it is told."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.sums: dict[str, int] = {}

    def expect(self, stage: str, total: int) -> None:
        self.totals[stage] = total

    def __call__(self, stage: str, size: int) -> None:
        self.sums[stage] = self.sums.get(stage, 0) + size


def test_each_stage_reports_the_bytes_it_announced(tiny_student: Path, tmp_path: Path) -> None:
    told = Told()
    planned = stages.plan(tiny_student, None, load_profile("host"), ("onnx",), 128, told)
    artifacts = stages.export(planned, tmp_path, told)
    found = stages.read_back(planned, artifacts, tmp_path, told)
    assert found.identical == found.total > 0
    package = sum(path.stat().st_size for path in tiny_student.rglob("*") if path.is_file())
    assert told.totals["load"] == 2 * package and package < told.sums["load"] <= 2 * package
    lm = planned.programs["lm"]
    for artifact in artifacts:
        stage = f"read back {artifact.component} {artifact.label}"
        if artifact.component == "lm":
            assert told.sums[stage] == told.totals[stage] == inheritance.size(lm)
    weights = sum(constant.nbytes for constant in lm.constants.values())
    assert told.totals["export lm for onnx"] == weights
    # Small tensors stay inside the model; planes of 8-bit codes and typed zero points are written beside the weights.
    assert 0.9 * weights < told.sums["export lm for onnx"] < 2.1 * weights


def test_a_bar_shows_bytes_of_how_many() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as display:
        bar = Bar(display)
        written = begin(bar, "export lm", 4_000_000)
        written(1_000_000)
        [task] = display.tasks
        assert (task.description, task.completed, task.total) == ("export lm", 1_000_000, 4_000_000)
        display.refresh()
        begin(bar, "[parity]")(5)
        [task] = display.tasks
        assert (task.completed, task.total) == (5, None)
        display.refresh()
    shown = console.file.getvalue()
    assert "1.0/4.0 MB" in shown and "[parity]" in shown


def test_a_plain_callback_is_not_told_totals() -> None:
    calls: list[tuple[str, int]] = []
    begin(lambda stage, size: calls.append((stage, size)), "load", 10)(3)
    assert calls == [("load", 0), ("load", 3)]
