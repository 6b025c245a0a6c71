"""README.md holds the tables that its tool writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.readme_tables import ORDER, README, fill, recorded_tables, support_table


def test_the_readme_shows_the_figures_that_are_kept() -> None:
    text = README.read_text()
    assert set(recorded_tables()) >= {"speed", "quality", "backends", "quantise", "sizes"}
    assert fill(text, recorded_tables()) == text


def test_a_missing_mark_is_named() -> None:
    with pytest.raises(ValueError, match="speed"):
        fill("no marks here", {"speed": "| a |"})


def test_support_says_what_ran(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    rows = {line.split("|")[1].strip(): line for line in support_table([bundle]).splitlines()}
    assert "not run" in rows["`jetson-orin`"] and "not run" in rows["`raspberry-pi-5`"]
    cells = [cell.strip() for cell in rows["`host`"].split("|")]
    assert cells[3:5] == ["not run", "not run"] and cells[2] in ORDER  # of a bundle with ONNX alone
