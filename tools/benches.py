"""What the benchmarks share: their options, a session of a lowered model, and where figures come from."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from exporters.external_data import WeightFile
from runtimes.cli import positive
from runtimes.host import cpu_model, usable_cores


def parser(name: str, purpose: str | None, threads: int) -> argparse.ArgumentParser:
    """The command line of ``python -m tools.<name>`` with --threads, `threads` by default, and --rounds."""
    made = argparse.ArgumentParser(
        prog=f"python -m tools.{name}", description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = f"threads of each session (default: {threads})"
    made.add_argument("--threads", type=positive, default=threads, metavar="N", help=default)
    made.add_argument("--rounds", type=positive, default=20, metavar="N", help="turns of each (default: 20)")
    return made


def output_option(made: argparse.ArgumentParser) -> None:
    """Adds --output."""
    made.add_argument("--output", type=Path, metavar="FILE", help="keep the figures, as JSON")


def origin(command: str) -> dict[str, str]:
    """What stands beside figures that are kept: machine, date and command."""
    return {
        "machine": f"{cpu_model()}, {usable_cores()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
    }


def written_session(model: ir.Model, path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Writes ``model`` to ``path``, its weights beside it, and opens it on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    with WeightFile(path.with_suffix(".data")) as weights:
        weights.adopt(model)
    ir.save(model, path)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
