"""Integer products in ONNX Runtime (exporters/passes/spell_integers.py) against what would run without that pass.

    python -m tools.bench_integers [--threads N] [--rounds N] [--output FILE]

Random 8-bit matrices with one scale a row, whose input is rounded to int8, through the exporter's own recipes with the
pass and without. Without it the input is rounded in float operators and multiplied by MatMulNBits: in `exact` over the
two 4-bit planes of exporters/passes/split_bytes.py, in `fast` over the bytes, with the input rounded again inside. In
every round each form has a turn, one call that is not timed and then several that are, on rows that the rounds before
did not have; figures are medians over the rounds.

What is expected: for one row every form reads the same bytes of weights, so what differs is the arithmetic. For many
rows it is the arithmetic alone: the planes are twice the columns in float32, and x86 multiplies twice as many int16 in
one instruction, so a quarter of the time at best; `fast` multiplies bytes, and rounds to them as it reads a block.

--output keeps the figures: `python -m tools.readme_tables` makes a table of tools/measurements/integers.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

from exporters import ops
from exporters.activations import Activation
from exporters.blocks import PARTS, BlockLayout
from exporters.families.modules import FusedLinear, QuantizedWeight
from exporters.onnx_ import FORMS, Form, lower
from exporters.onnx_lowering import to_onnx
from exporters.passes.spell_integers import INTEGER_PRODUCTS, spell_integers
from exporters.program import Program, capture
from exporters.quantise.grids import Width, round_to_nearest
from runtimes.bundle import TensorSpec
from runtimes.cli import exit_code
from tools.bench_peers import warm
from tools.benches import origin, output_option, parser, written_session
from tools.readme_tables import integers_table

INTEGERS = "integers"
ROWS = (1, 64, 512)
#: Of the matrices: as the build stores an 8-bit one.
WIDTH = Width(8)
#: Scale of the input -> its rounding: each row's own, or one whose codes reach 4 standard deviations.
ACTIVATIONS: Mapping[str, Activation] = {"dynamic": Activation("int8"), "static": Activation("int8", scale=2.0**-5)}


@dataclass(frozen=True)
class Shape:
    """A matrix that turns K columns into N."""

    columns: int
    rows: int

    def __str__(self) -> str:
        return f"{self.columns} x {self.rows}"


#: Of Qwen2.5-0.5B: what leads out of an MLP, and gate and up, which one product joins.
SHAPES = (Shape(4864, 896), Shape(896, 9728))


def program_of(shape: Shape, activation: Activation) -> Program:
    """One layer as a program of its own."""
    weight = torch.randn(shape.rows, shape.columns) / shape.columns**0.5
    stored = round_to_nearest(weight, WIDTH).tensor(WIDTH, "random")
    layout = BlockLayout.of(stored)
    matrix = QuantizedWeight(shape.rows, shape.columns, layout)
    for part, make in PARTS.items():
        if getattr(matrix, part) is not None:
            setattr(matrix, part, torch.from_numpy(make(stored)))
    layer: nn.Module = FusedLinear(matrix, None, activation).eval()
    spec = (TensorSpec("y", "float32", ("T", shape.rows)),)
    return capture("lm", layer, (torch.randn(3, shape.columns),), {"x": {0: "T"}}, spec, ("x",))


def without(program: Program, recipe: Form) -> ir.Model:
    """The program by a recipe that lacks the pass, and so must not have the node that the pass spells out."""
    rounding = {ops.quantize_activation.overload: ops.quantize_activation.decomposition("onnx/standard")}
    table = {op.overload: op.decomposition(recipe.target) for op in ops.REGISTRY.values()}
    passes = [edit for edit in recipe.passes if edit is not spell_integers]
    return to_onnx(program, table | ops.aten_lowerings(recipe.target) | rounding, recipe.opset, passes)


def contenders(program: Program, folder: Path, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    """The form with integer products, which `exact` and `fast` share, and both modes without them."""
    models = {INTEGERS: lower(program, FORMS["fused", "exact"])}
    models |= {f"{mode} without": without(program, FORMS["fused", mode]) for mode in ("exact", "fast")}
    made = {}
    for name, model in models.items():
        made[name] = written_session(model, folder / f"{name.replace(' ', '_')}.onnx", threads)
        operators = {node.op_type for node in model.graph}
        assert (name == INTEGERS) == ("MatMulNBits" not in operators) == bool(INTEGER_PRODUCTS.keys() & operators)
    return made


def measure(
    made: Mapping[str, onnxruntime.InferenceSession], rows: int, columns: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each form, and the largest difference of its results from those of the integer products, as a
    share of their largest value."""
    random = np.random.default_rng(rows)
    turns: dict[str, list[float]] = {name: [] for name in made}
    apart = dict.fromkeys(made, 0.0)
    for turn in range(rounds + 1):
        feeds, results = {"x": random.standard_normal((rows, columns)).astype(np.float32)}, {}
        for name, session in made.items():
            results[name] = session.run(None, feeds)[0]
            seconds = warm(lambda s=session, f=feeds: s.run(None, f))
            if turn:  # the first is to warm up
                turns[name].append(seconds)
        exact = results[INTEGERS]
        for name, y in results.items():
            apart[name] = max(apart[name], float(np.abs(y - exact).max() / np.abs(exact).max()))
    return {name: statistics.median(seconds) for name, seconds in turns.items()}, apart


def run(options: argparse.Namespace) -> int:
    """Measures and prints, and keeps the figures where --output says."""
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for shape in SHAPES:
        for scale, activation in ACTIVATIONS.items():
            with tempfile.TemporaryDirectory(prefix="integers-") as folder:
                made = contenders(program_of(shape, activation), Path(folder), options.threads)
                for rows in ROWS:
                    medians, apart = measure(made, rows, shape.columns, options.rounds)
                    what = {"matrix": str(shape), "scale": scale, "rows": rows}
                    found.append({**what, "median_seconds": medians, "difference": apart})
                del made
    kept = {
        **origin(f"python -m tools.bench_integers --threads {options.threads} --rounds {options.rounds}"),
        "versions": {"onnxruntime": onnxruntime.__version__},
        "rows": found,
    }
    Console(width=120).print(Markdown(integers_table(kept)))
    if options.output is not None:
        options.output.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    made = parser("bench_integers", __doc__, threads=1)
    output_option(made)
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
