"""Benchmarks run end to end and say when a figure is not to be used. Nothing here asserts a speed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import host
from runtimes.bandwidth import measure_roof
from runtimes.bench import BenchError, bench, latency_row, main, measure_apart
from runtimes.bundle import load_bundle
from runtimes.host import Conditions, cores_of_others, why_invalid
from runtimes.measure import Effort, Figure, _drift
from runtimes.parity import Selection
from runtimes.report import Latency, read_report
from tests.runtimes.bundle_edits import copy_bundle
from tests.runtimes.eager_lm import lm_artifact

QUICK = ["--threads", "1", "--steps", "4", "--repeats", "2"]
START = Conditions(time=0.0, own_seconds=1.0, busy_seconds=100.0, load=0.1, throttle_events=0, throttled=False)
CORES = os.cpu_count() or 1


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(tiny_bundle, tmp_path / "bundle")


def metrics(rows: tuple[Latency, ...] | list[Latency], component: str) -> dict[str, Latency]:
    return {row.metric: row for row in rows if row.component == component}


def test_the_command_measures_every_component_and_reports(folder: Path) -> None:
    command = [sys.executable, "-m", "runtimes.bench", str(folder), *QUICK, "--soak", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = read_report(folder)
    lm = metrics(report.latency, "lm")
    assert set(lm) >= {
        *("load", "cold", "ttft_p50", "tpot_p50", "tpot_p90", "tpot_p99", "tokens_per_second", "shim", "shim_share"),
        *("peak_rss", "base_rss", "bytes_per_token", "roof_share", "sustained_first", "sustained_last", "rss_growth"),
    }
    assert all(row.value > 0 for row in report.latency if row.metric != "rss_growth")
    assert lm["tpot_p50"].value <= lm["tpot_p90"].value <= lm["tpot_p99"].value
    assert lm["peak_rss"].value >= lm["base_rss"].value
    for component in ("image_decoder", "image_encoder", "audio_decoder", "audio_encoder"):
        assert set(metrics(report.latency, component)) >= {"load", "cold", "latency_p50", "latency_p99", "peak_rss"}
    assert report.environment is not None
    assert {"cpu", "cores", "governor", "packages", "bandwidth_roof", "conditions"} <= set(report.environment)
    assert "tokens_per_second" in done.stdout
    load_bundle(folder).verify()


def test_memory_is_the_artifacts_own_not_that_of_the_process_that_asked(folder: Path) -> None:
    bundle = load_bundle(folder)
    held = np.ones(400 << 20, np.uint8)
    measured = measure_apart(bundle, bundle.artifact("image_decoder"), Effort(1, 4, 2))
    peak = next(figure.value for figure in measured.figures if figure.metric == "peak_rss")
    assert held.nbytes / 2**20 > peak


def test_parity_results_stay_in_the_report(folder: Path) -> None:
    from runtimes.parity import main as parity

    assert parity([str(folder), "--component", "image_decoder", "--threads", "1"]) == 0
    before = read_report(folder).results
    assert main([str(folder), "--component", "image_decoder", *QUICK]) == 0
    report = read_report(folder)
    assert report.results == before
    assert report.latency


@pytest.mark.long
def test_loadgen_runs_both_scenarios(folder: Path) -> None:
    arguments = [str(folder), "--component", "lm", *QUICK, "--loadgen", "--loadgen-seconds", "1"]
    assert main(arguments) == 0
    found = metrics(read_report(folder).latency, "lm")
    assert found["loadgen_single_stream_p90"].value > 0
    assert found["loadgen_offline"].value > 0
    assert "golden prompt" in found["loadgen_offline"].where


def test_a_measurement_that_fails_says_what_its_process_said(folder: Path) -> None:
    bundle = load_bundle(folder)
    bundle.file(bundle.artifact("image_decoder").model).write_bytes(b"not a graph")
    with pytest.raises(BenchError, match="the measurement ended with 2: error: "):
        measure_apart(bundle, bundle.artifact("image_decoder"), Effort(1, 4, 2))


def test_selecting_nothing_lists_what_there_is(folder: Path) -> None:
    with pytest.raises(BenchError, match=r"no artifact matches.*lm onnx"):
        bench(load_bundle(folder), Selection(backend="tvm"), Effort())


def after(seconds: float = 10.0, own: float = 10.0, others: float = 0.0, **changes: Any) -> Conditions:
    spent = {"own_seconds": START.own_seconds + own, "busy_seconds": 100.0 + own + others}
    return replace(START, time=seconds, **spent | changes)


@pytest.mark.parametrize(
    ("end", "threads", "reason"),
    [
        (after(), 1, ""),
        (after(others=1.0), CORES, ""),
        (after(others=5.0), CORES, "busy: others use 0.5"),
        (after(others=10.0 * (CORES - 1)), 1, ""),
        (after(others=10.0 * CORES), 1, "busy"),
        (after(own=0.0), CORES + 1, ""),
        (after(throttle_events=3), 1, "throttled"),
        (after(throttled=True), 1, "throttled"),
        (after(others=10.0 * CORES, throttled=True), 1, "busy"),
    ],
)
def test_what_makes_a_timing_invalid(end: Conditions, threads: int, reason: str) -> None:
    found = why_invalid(START, end, threads)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_without_the_machines_time_the_load_decides() -> None:
    blind = replace(START, busy_seconds=None)
    assert why_invalid(blind, replace(blind, time=10.0), CORES) == ""
    loaded = replace(blind, load=CORES + 1.0)
    assert why_invalid(loaded, replace(loaded, time=10.0), 1).startswith("busy")


def test_a_process_that_works_is_seen_by_the_others_and_not_by_itself() -> None:
    before = Conditions.now()
    end = before.time + 1.0
    child = subprocess.Popen([sys.executable, "-c", "import time\nt = time.time() + 1\nwhile time.time() < t: pass"])
    while Conditions.now().time < end:
        pass
    now = Conditions.now()
    child.wait()
    assert now.own_seconds - before.own_seconds > 0.1
    if before.busy_seconds is not None:
        others = cores_of_others(before, now)
        assert others is not None
        assert 0.1 < others <= CORES


def test_steps_that_slow_down_are_no_steady_state() -> None:
    steady = np.full(5, 1e-3)
    assert _drift(steady) == ""
    steady[-1] = 1.5e-3
    assert _drift(steady).startswith("unsteady")


def test_an_invalid_timing_is_marked_and_a_size_is_not() -> None:
    time, size = Figure("tpot_p50", 0.5, "ms", "5 x 64 steps"), Figure("peak_rss", 80.0, "MiB", "whole process")
    row = latency_row(lm_artifact(), time, "throttled")
    assert (row.status, row.where) == ("invalid", "5 x 64 steps; throttled")
    assert latency_row(lm_artifact(), size, "throttled").status == "valid"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_roof_is_measured(threads: int) -> None:
    roof = measure_roof(threads, size=8 << 20)
    assert roof.bytes_per_second > 1e6
    assert roof.method in ("read", "copy")


def test_the_environment_names_the_machine_and_the_versions() -> None:
    found = host.environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert "numpy" in found["packages"]
    assert host.peak_rss_bytes() >= 10 << 20
