"""The bench of integer products: each form is what its name says, and all compute the same layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.bench_integers import ACTIVATIONS, INTEGERS, Shape, contenders, measure, program_of
from tools.readme_tables import integers_table


@pytest.mark.parametrize("scale", ACTIVATIONS)
def test_all_forms_compute_one_layer(scale: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Shape(columns=128, rows=96)
    made = contenders(program_of(shape, ACTIVATIONS[scale]), tmp_path, threads=1)
    medians, apart = measure(made, rows=5, columns=shape.columns, rounds=2)
    assert medians.keys() == made.keys() == {INTEGERS, "exact without", "fast without"}
    assert 0 < apart["exact without"] <= 1e-5
    assert 1e-5 < apart["fast without"] <= 0.05  # its input is rounded twice


def test_the_table_shows_shares_of_the_time() -> None:
    row = {"matrix": "64 x 32", "scale": "static", "rows": 8, "median_seconds": {"new": 0.001, "old": 0.004}}
    head, _, line, _, source = integers_table(
        {"rows": [row], "machine": "a machine", "date": "today", "command": "as here"}
    ).splitlines()
    assert head == "| matrix | input's scale | rows | new | old | new / old |"
    assert line == "| 64 x 32 | static | 8 | 1.000 ms | 4.000 ms | 0.25 |"
    assert source == "a machine, today: `as here`"
