"""Every cell of README's matrix of formats and backends, found anew: export, read back, compare, run.

The usual run has the two forms that most devices get, for the cases in which codes are arranged otherwise; the rest is
marked long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.format_matrix import COLUMNS, README, Checkpoint, cell, load, read_table
from tools.make_checkpoints import CASES

#: What the usual run repeats.
USUAL_CASES = ("gptq-4bit-act-order", "gptq-3bit", "pack-2bit", "gptq-4bit-tail")
USUAL_COLUMNS = ("ONNX fused", "OpenVINO")

Loaded = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """`loaded(case)`; of the last case only, which the tests ask for in turn."""
    last: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in last:
            last.clear()
            last[name] = load(name, tmp_path_factory.mktemp(name))
        return last[name]

    return make


def _cells() -> Iterator[object]:
    for name in CASES:
        for title in COLUMNS:
            usual = name in USUAL_CASES and title in USUAL_COLUMNS
            yield pytest.param(name, title, id=f"{name}-{title}", marks=() if usual else pytest.mark.long)


@pytest.mark.parametrize(("name", "title"), list(_cells()))
def test_a_cell_says_what_happens(loaded: Loaded, name: str, title: str, tmp_path: Path) -> None:
    said = read_table(README.read_text("utf-8"))[CASES[name].format][title]
    assert cell(loaded(name), COLUMNS[title], tmp_path) == said


def test_the_table_has_every_case_and_column() -> None:
    table = read_table(README.read_text("utf-8"))
    assert list(table) == [case.format for case in CASES.values()]
    assert all(list(row) == list(COLUMNS) for row in table.values())
    words = [words.partition(":")[0] for row in table.values() for words in row.values()]
    assert set(words) <= {"exact", "rewritten", "refused"}
    assert len(words) == math.prod((len(CASES), len(COLUMNS)))
