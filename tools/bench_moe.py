"""A layer of experts in ONNX Runtime, fused (exporters/passes/fuse_experts.py) against dense, in one interleaved run.

    python -m tools.bench_moe [--threads N] [--rounds N] [--mode exact|fast]

Random 4-bit experts with zero points behind a router of softmax and top-k, through the exporter's own recipe with the
pass and without. In every round each form has a turn with rows that neither saw before, so that other experts are
chosen; figures are medians over the rounds.

What is expected: one row reads all weights in the dense form and k of E experts' in the fused one, and a step takes as
long as it reads: E/k. For 64 rows nearly every expert is chosen by some row, so both forms read all weights; what
differs is that each row is multiplied with k experts instead of E: at most E/k, less what a product of few rows loses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from exporters import ops
from exporters.blocks import BlockLayout
from exporters.families.experts import DenseExperts
from exporters.families.modules import FusedLinear, QuantizedWeight
from exporters.onnx_ import FORMS, SINCE, lower
from exporters.passes.fuse_experts import EXPERTS, unread
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec
from runtimes.cli import exit_code
from runtimes.host import cpu_model, usable_cores
from tools.benches import parser, written_session

ROWS = (1, 64)


@dataclass(frozen=True)
class Shape:
    """E experts, k of them for a row, of width I in a layer of width H."""

    experts: int
    chosen: int
    hidden: int
    width: int

    def __str__(self) -> str:
        return f"{self.chosen} of {self.experts}, {self.hidden} x {self.width}"


#: Of few wide experts, as Mixtral's, to many narrow ones, as Qwen3-MoE's.
SHAPES = (Shape(8, 2, 1024, 1792), Shape(32, 4, 1024, 768), Shape(60, 4, 1024, 704), Shape(128, 8, 1024, 384))


class Layer(nn.Module):
    """``forward(rows [T, H]) -> [T, H]``: a router over experts of random codes."""

    def __init__(self, shape: Shape, layout: BlockLayout) -> None:
        super().__init__()
        experts, hidden, width = shape.experts, shape.hidden, shape.width
        inner = random_linear(2 * width * experts, hidden, layout)
        outer = [random_linear(hidden, width, layout) for _ in range(experts)]
        self.router = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5, requires_grad=False)
        self.chosen = shape.chosen
        self.experts = DenseExperts([inner], list(outer), experts, ops.swiglu, paired=True)

    def forward(self, rows: Tensor) -> Tensor:
        weights, choice = torch.softmax(rows @ self.router.t(), -1).topk(self.chosen)
        return self.experts(rows, choice, weights / weights.sum(-1, keepdim=True))


def random_linear(rows: int, columns: int, layout: BlockLayout) -> FusedLinear:
    matrix = QuantizedWeight(rows, columns, layout)
    matrix.codes.random_(0, 256)
    matrix.scales.uniform_(0.5, 1.5).div_(2 ** (layout.bits - 2) * columns**0.5)
    if matrix.zeros is not None:
        matrix.zeros.random_(0, 256)
    return FusedLinear(matrix, None)


def program_of(shape: Shape, layout: BlockLayout) -> Program:
    """The layer as a program of its own."""
    spec = (TensorSpec("y", "float32", ("T", shape.hidden)),)
    rows = torch.randn(3, shape.hidden)
    return capture("lm", Layer(shape, layout).eval(), (rows,), {"rows": {0: "T"}}, spec, ("rows",))


@dataclass(frozen=True)
class Contender:
    """One form of a layer: its session and the bytes of weights that one row reads."""

    session: onnxruntime.InferenceSession
    read: int

    def run(self, rows: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"rows": rows})[0]


def contenders(program: Program, mode: str, folder: Path, threads: int) -> dict[str, Contender]:
    """The fused form and the dense one, "fused" and "dense"."""
    recipe = FORMS["fused", mode]
    plain = replace(recipe, passes=tuple(edit for edit in recipe.passes if edit not in SINCE))
    made, translated = {}, {}
    for name, each in (("fused", recipe), ("dense", plain)):
        model = lower(program, each, translated)
        session = written_session(model, folder / f"{name}.onnx", threads)
        stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        made[name] = Contender(session, stored - unread(model))
        assert (name == "fused") == any(node.op_type == EXPERTS for node in model.graph)
    return made


def measure(made: dict[str, Contender], rows: int, hidden: int, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of each form, and the largest difference of their results as a share of the largest value."""
    random, turns, apart = np.random.default_rng(rows), {name: [] for name in made}, 0.0
    for turn in range(rounds + 2):
        x, results = random.standard_normal((rows, hidden)).astype(np.float32), {}
        for name, contender in made.items():
            start = time.perf_counter()
            results[name] = contender.run(x)
            if turn >= 2:  # the first are to warm up
                turns[name].append(time.perf_counter() - start)
        fused, dense = results["fused"], results["dense"]
        apart = max(apart, float(np.abs(fused - dense).max() / np.abs(dense).max()))
    return {name: statistics.median(seconds) for name, seconds in turns.items()}, apart


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    torch.manual_seed(0)
    columns = ("experts", "rows", "fused", "dense", "dense / fused", "expected", "difference")
    table = Table(*columns, title=f"{cpu_model()}, {usable_cores()} cores, {options.threads} threads, {options.mode}")
    for shape in SHAPES:
        program = program_of(shape, BlockLayout(4, 32, True))
        with tempfile.TemporaryDirectory(prefix="moe-") as folder:
            made = contenders(program, options.mode, Path(folder), options.threads)
            for rows in ROWS:
                medians, apart = measure(made, rows, shape.hidden, options.rounds)
                fused, dense = medians["fused"], medians["dense"]
                bytes_read = made["dense"].read / made["fused"].read
                expected = f"{bytes_read:.1f}" if rows == 1 else f"at most {shape.experts / shape.chosen:.1f}"
                times = [f"{1e3 * seconds:.3f} ms" for seconds in (fused, dense)]
                table.add_row(str(shape), str(rows), *times, f"{dense / fused:.1f}", expected, f"{apart:.1e}")
            del made
    Console(width=120).print(table)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    made = parser("bench_moe", __doc__, threads=2)
    made.add_argument("--mode", choices=("exact", "fast"), default="exact", help="(default: exact)")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
