"""The bench of a layer of experts: both forms are what their names say, and compute the same."""

from __future__ import annotations

from pathlib import Path

from exporters.blocks import BlockLayout
from tools.bench_moe import Shape, contenders, measure, program_of


def test_both_forms_compute_one_layer(tmp_path: Path) -> None:
    shape = Shape(experts=4, chosen=1, hidden=64, width=96)
    made = contenders(program_of(shape, BlockLayout(4, 32, True)), "exact", tmp_path, threads=1)
    medians, apart = measure(made, rows=5, hidden=shape.hidden, rounds=2)
    assert medians.keys() == {"fused", "dense"} == made.keys() and apart <= 3e-6
    assert 2 < made["dense"].read / made["fused"].read < 4  # a quarter of the experts, and the router
