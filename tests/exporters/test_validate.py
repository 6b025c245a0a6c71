"""The package validator's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporters.validate import main


def test_a_sound_package_is_described(tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_student)]) == 0
    text = capsys.readouterr().out
    assert "tiny-llama-int4 1.0.0" in text and "image: tokens 72..103, 1 x 32 codes, grid [4, 4]" in text


def test_a_folder_that_is_no_package_gets_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_the_schema_is_json_and_names_the_modality_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    assert "modalities" in json.loads(capsys.readouterr().out)["required"]
