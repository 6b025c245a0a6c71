"""Every artifact of a bundle that runs here, timed in one interleaved run, with ratios to ONNX Runtime.

    python -m tools.bench_backends BUNDLE [--threads N] [--rounds N] [--output FILE]

In every round each artifact has its turn, warm: a call that is not timed, then several that are. Sessions are opened
for one task at a time and run on the same number of threads. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from runtimes.bundle import Artifact, Bundle, load_bundle
from runtimes.cli import exit_code
from runtimes.golden import load_feeds, load_lm
from runtimes.session import BackendUnavailable, CheckedSession, open_session
from tools.benches import origin, output_option, parser

PREFILL, STEPS, CALLS = 64, 64, 5
BASE = "onnx/fused/exact"

#: Runs once and returns the seconds of one call.
Run = Callable[[CheckedSession], float]


def tasks(bundle: Bundle) -> dict[str, tuple[str, Run]]:
    """Name of a task -> (component, one warm turn of it)."""
    found: dict[str, tuple[str, Run]] = {}
    if any(artifact.component == "lm" for artifact in bundle.artifacts):
        ids = load_lm(bundle).ids[:1]
        prefill, prompt = (np.ascontiguousarray(ids[:, :length]) for length in (PREFILL, 8))
        found["lm decode, per token"] = ("lm", lambda session: _decode(session, prompt))
        found[f"lm prefill of {PREFILL}"] = ("lm", lambda session: _prefill(session, prefill))
    for component in dict.fromkeys(artifact.component for artifact in bundle.artifacts):
        if component != "lm":
            artifact = bundle.artifact(component)
            feeds = load_feeds(bundle, artifact)
            found[component] = (component, lambda session, feeds=feeds: _timed(lambda: session.run(feeds)))
    return found


def _decode(session: CheckedSession, prompt: np.ndarray) -> float:
    session.reset()
    token = np.array([[int(session.run({"ids": prompt})["logits"].argmax())]], np.int32)
    session.run({"ids": token})
    start = time.perf_counter()
    for _ in range(STEPS):
        session.run({"ids": token})
    return (time.perf_counter() - start) / STEPS


def _prefill(session: CheckedSession, ids: np.ndarray) -> float:
    def once() -> None:
        session.reset()
        session.run({"ids": ids})

    return _timed(once)


def _timed(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measure(bundle: Bundle, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Task -> label of the artifact -> median seconds; artifacts that only a stand-in can run here are left out."""
    medians: dict[str, dict[str, float]] = {}
    for task, (component, run) in tasks(bundle).items():
        with ExitStack() as stack:
            sessions = {}
            for artifact in bundle.artifacts:
                if artifact.component == component and (session := _opened(bundle, artifact, threads)) is not None:
                    sessions[artifact.label] = stack.enter_context(session)
            turns: dict[str, list[float]] = {label: [] for label in sessions}
            for _ in range(rounds):
                for label, session in sessions.items():
                    turns[label].append(run(session))
        medians[task] = {label: statistics.median(seconds) for label, seconds in turns.items()}
    return medians


def _opened(bundle: Bundle, artifact: Artifact, threads: int) -> CheckedSession | None:
    try:
        session = open_session(bundle, artifact, threads)
    except BackendUnavailable:
        return None
    if session.stand_in is not None:
        session.close()
        return None
    return session


def run(options: argparse.Namespace) -> int:
    """Measures and prints, and keeps the figures where --output says."""
    bundle = load_bundle(options.bundle)
    medians = measure(bundle, options.threads, options.rounds)
    table = Table("task", "artifact", "median", f"of {BASE}'s time")
    for task, row in medians.items():
        for label, seconds in row.items():
            ratio = f"{seconds / row[BASE]:.2f}" if BASE in row else "-"
            table.add_row(task, label, f"{1e3 * seconds:.3f} ms", ratio)
    Console().print(table)
    if options.output is not None:
        command = f"python -m tools.bench_backends BUNDLE --threads {options.threads} --rounds {options.rounds}"
        kept: dict[str, Any] = {
            "student": f"{bundle.student.name} {bundle.student.version}",
            **origin(command),
            "base": BASE,
            "median_seconds": medians,
        }
        options.output.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    made = parser("bench_backends", __doc__, threads=1)
    made.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that exporters.build made for this machine")
    output_option(made)
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
