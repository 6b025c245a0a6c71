"""How the table of ops runs on each backend: one file per backend, found by the table below.

A runner's file has RUNNERS: one Runner per target of its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from exporters.program import Program
from tests.exporters.op_cases import Array, Case

Step = Callable[[Mapping[str, Array]], list[Array]]


@dataclass(frozen=True)
class Runner:
    """One target of the table.

    Attributes:
        target: its name, as in "onnx/fused".
        build: (case, program of its one call, scratch folder) -> a function from the caller's inputs and the states to
            the outputs and the new states, as the backend computes them; it must go through the backend's exporter code
            and files, and assert that the operator of ``operators`` is there (or is not, where the case is decomposed).
        operators: op -> the operator that must stand in the artifact; "" where the op is made of plain ones.
        tolerance: "exact", "float32", "float16" -> largest difference from the formula, as a share of the largest
            value expected.
        filler: what slots of the cache that were never written hold at the start.
        refused: case -> why this backend cannot take it, or None; `build` must then raise an ExportError saying that.
        left_out: cases that another target of the backend runs and this one would only repeat, or that its programs
            never hold; never all of an op.
        usual: the cases of the usual run, the others are marked long; None for all.
    """

    target: str
    build: Callable[[Case, Program, Path], Step]
    operators: Mapping[str, str]
    tolerance: Mapping[str, float]
    filler: float = np.nan
    refused: Callable[[Case], str | None] = lambda case: None
    left_out: frozenset[str] = frozenset()
    usual: frozenset[str] | None = None

    def is_long(self, case: Case) -> bool:
        """Whether the case is not one of the usual run."""
        return self.usual is not None and str(case) not in self.usual


#: Every backend that runs here.
MODULES = ("onnx", "openvino", "tvm", "coreml", "tensorrt")
RUNNERS: dict[str, Runner] = {
    runner.target: runner for module in MODULES for runner in import_module(f"tests.exporters.runners.{module}").RUNNERS
}
