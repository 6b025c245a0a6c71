"""Measures a bundle on this machine: load, cold and warm latency, tokens per second, memory, share of the roof.

    python -m runtimes.bench BUNDLE [--component NAME] [--soak 10000] [--loadgen]

Each artifact is measured in a process of its own. A figure from a busy, throttled or unsteady machine is marked
`invalid`, with the reason; it is there to be seen, not to be used. Compare two builds only by figures from one
interleaved run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runtimes.bandwidth import Roof, measure_roof
from runtimes.bundle import Artifact, Bundle
from runtimes.cli import bundle_parser, exit_code, open_bundle, positive
from runtimes.errors import Fault
from runtimes.golden import load_lm
from runtimes.host import Conditions, environment, usable_cores, why_invalid
from runtimes.loadgen import SCENARIOS, TOKENS, LoadGenResult, run_loadgen
from runtimes.measure import USUAL, Effort, Figure, Measurement
from runtimes.output import check_writable
from runtimes.parity import ALL, Selection
from runtimes.report import REPORT_JSON, Latency, Report, Result, Status, print_report, read_report, write_report
from runtimes.session import choose_artifact, open_session

BUDGET = "budget"
# Figure of the preferred language model -> key of the profile, and the factor to the key's unit.
BUDGETS = (("ttft_p50", "ttft_ms", 1.0), ("tpot_p50", "tpot_ms", 1.0), ("peak_rss", "rss_bytes", float(1 << 20)))

# A measurement that has not ended by then hangs: the slowest board takes minutes for its soak.
CHILD_SECONDS = 3600


class BenchError(Fault):
    """A measurement could not be made."""


def bench(bundle: Bundle, selection: Selection, effort: Effort) -> tuple[list[Latency], dict[str, Any]]:
    """The latency rows of the selected artifacts, and the environment with each one's conditions."""
    chosen = [artifact for artifact in bundle.artifacts if selection.holds(artifact)]
    if not chosen:
        held = ", ".join(f"{a.component} {a.label}" for a in bundle.artifacts) or "no artifact"
        raise BenchError("no artifact matches", str(bundle.folder), f"This bundle holds: {held}")
    away = selection.placed(bundle).stand_in
    threads = effort.threads or usable_cores()
    conditions: dict[str, Any] = {}
    rows: list[Latency] = []
    roof = measure_roof(threads)
    for artifact in chosen:
        measurement = measure_apart(bundle, artifact, effort)
        if away:
            reasons = filter(None, (f"run on {away}", measurement.invalid))
            measurement = replace(measurement, invalid="; ".join(reasons))
        conditions[f"{artifact.component} {artifact.label}"] = {
            **measurement.notes,
            "precision": {**artifact.precision, **measurement.effective},
        }
        figures = [*measurement.figures, *roof_share(measurement, roof)]
        rows += [latency_row(artifact, figure, measurement.invalid) for figure in figures]
    return rows, {**environment(), "bandwidth_roof": asdict(roof), "conditions": conditions}


def measure_apart(bundle: Bundle, artifact: Artifact, effort: Effort) -> Measurement:
    """One artifact in a fresh process. Raises BenchError with what that process said when it fails."""
    name = f"{artifact.component} {artifact.label}"
    command = [sys.executable, "-m", "runtimes.measure", str(bundle.folder.absolute())]
    command += [artifact.component, artifact.backend, artifact.form, artifact.mode, json.dumps(asdict(effort))]
    paths = [str(Path(__file__).absolute().parent.parent), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"no result within {CHILD_SECONDS} s", name, "Use fewer --soak tokens") from error
    if done.returncode:
        raise BenchError(
            f"the measurement ended with {done.returncode}: {done.stderr.strip()[-2000:]}",
            name,
            "Correct what it says, or choose other artifacts (--component, --form)",
        )
    raw = json.loads(done.stdout.splitlines()[-1])
    figures = tuple(Figure(**figure) for figure in raw["figures"])
    return Measurement(figures, raw["invalid"], raw["notes"], raw["effective"])


def check_budgets(bundle: Bundle, rows: Sequence[Latency]) -> list[Result]:
    """The profile's budgets against what was measured; a figure that is not valid leaves its row pending."""
    held = float(sum(info.size for info in bundle.files.values()))
    results = [_budget(bundle, "bundle", "bundle_bytes", held, "sum of the files", None)]
    for artifact in bundle.artifacts:
        if artifact.component != "lm" or not artifact.preferred:
            continue
        key = (artifact.component, artifact.backend, artifact.form, artifact.mode)
        mine = {row.metric: row for row in rows if row.key[:4] == key}
        for metric, limit, factor in BUDGETS:
            row = mine.get(metric)
            value = row.value * factor if row is not None and row.status == "valid" else None
            where = row.where if row is not None else "not measured"
            results.append(_budget(bundle, metric, limit, value, where, artifact))
    return results


def _budget(
    bundle: Bundle, metric: str, key: str, value: float | None, where: str, artifact: Artifact | None
) -> Result:
    limit = float(bundle.profile[key])
    status: Status = "pending-device" if value is None else "passed" if value <= limit else "failed"
    names = (artifact.backend, artifact.form, artifact.mode) if artifact else ("-", "-", "-")
    component = artifact.component if artifact else "bundle"
    return Result(component, *names, BUDGET, metric, value, limit, f"profile {key}", status, where)


def roof_share(measurement: Measurement, roof: Roof) -> list[Figure]:
    """Bytes per token (weights, and the cache as full as it was on average) x tokens per second / bandwidth."""
    found = {figure.metric: figure.value for figure in measurement.figures}
    if "bytes_per_token" not in found:
        return []
    moved = found["bytes_per_token"] + found.get("cache_bytes", 0.0)
    share = moved * found["tokens_per_second"] / roof.bytes_per_second
    return [Figure("roof_share", share, "of the roof", f"{roof.bytes_per_second / 1e9:.1f} GB/s by {roof.method}")]


def latency_row(artifact: Artifact, figure: Figure, invalid: str) -> Latency:
    """A row of the report. Sizes read from the manifest or the system hold on a busy machine too."""
    timed = figure.unit not in ("bytes", "MiB", "KiB")
    return Latency(
        component=artifact.component,
        backend=artifact.backend,
        form=artifact.form,
        mode=artifact.mode,
        metric=figure.metric,
        value=figure.value,
        unit=figure.unit,
        status="invalid" if invalid and timed else "valid",
        where=f"{figure.where}; {invalid}" if invalid and timed else figure.where,
    )


def bench_loadgen(bundle: Bundle, selection: Selection, seconds: float) -> list[Latency]:
    """LoadGen's SingleStream and Offline on the language model. Raises LoadGenError."""
    artifact = choose_artifact(bundle, "lm", selection.backend, selection.form, selection.mode)
    golden = load_lm(bundle)
    prompts = [golden.ids[i : i + 1, :length].copy() for i, length in enumerate(golden.prompt)]
    rows = []
    with open_session(bundle, artifact, selection.threads) as session:
        for scenario in SCENARIOS:
            before = Conditions.now()
            result = run_loadgen(session, bundle.vocab_size, prompts, scenario, seconds)
            reasons = ["" if result.valid else "LoadGen calls the run invalid"]
            reasons.append(why_invalid(before, Conditions.now(), selection.threads or usable_cores()))
            rows.append(latency_row(artifact, _loadgen_figure(result), "; ".join(filter(None, reasons))))
    return rows


def _loadgen_figure(result: LoadGenResult) -> Figure:
    where = f"LoadGen, {result.samples} samples of a golden prompt and {TOKENS} tokens"
    if result.scenario == "SingleStream":
        return Figure("loadgen_single_stream_p90", result.value * 1e3, "ms", where)
    return Figure("loadgen_offline", result.value, "samples/s", where)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = bundle_parser("bench", "Measures a bundle on this machine.", __doc__ or "")
    parser.add_argument("--component", metavar="NAME", help="one component, such as lm or image_decoder (default: all)")
    parser.add_argument("--form", metavar="NAME", help="one form, such as fused or standard (default: all)")
    parser.add_argument("--on-device", action="store_true", help="this is the profile's device, though unrecognised")
    parser.add_argument("--steps", type=positive, default=64, metavar="N", help="decode steps per pass (default: 64)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="counted passes (default: 5)")
    parser.add_argument(
        "--soak", type=positive, default=0, metavar="N", help="N tokens more: memory and speed at length"
    )
    parser.add_argument("--loadgen", action="store_true", help="also run MLPerf LoadGen (extra `loadgen`)")
    parser.add_argument("--loadgen-seconds", type=positive, default=10, metavar="S", help="per scenario (default: 10)")
    parser.add_argument("--no-report", action="store_true", help="leave the bundle's report.json as it is")
    return parser.parse_args(arguments)


def bench_and_report(bundle: Bundle, selection: Selection = ALL, effort: Effort = USUAL) -> list[Latency]:
    """Measures, and merges the rows into the bundle's report. Raises BenchError, ReportError, BundleError."""
    report = read_report(bundle.folder)
    rows, measured_on = bench(bundle, selection, effort)
    write_report(bundle.folder, report.merged(latency=rows, environment=measured_on))
    return rows


def run(options: argparse.Namespace) -> int:
    """Measures, prints and reports."""
    bundle = open_bundle(options.bundle, options.trust)
    if not options.no_report:
        check_writable(bundle.folder / REPORT_JSON)
    selection = Selection(
        options.component, options.backend, options.form, options.mode, options.threads, on_device=options.on_device
    )
    effort = Effort(options.threads, options.steps, options.repeats, options.soak)
    report = Report() if options.no_report else read_report(bundle.folder)
    rows, measured_on = bench(bundle, selection, effort)
    if options.loadgen:
        rows += bench_loadgen(bundle, selection, options.loadgen_seconds)
    if not options.no_report:
        write_report(bundle.folder, report.merged(latency=rows, environment=measured_on))
    print_report(Report(latency=tuple(rows)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
