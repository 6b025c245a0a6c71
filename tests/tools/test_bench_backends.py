"""The interleaved benchmark runs every task on every artifact that is here, and leaves out what a stand-in runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtimes.bundle import load_bundle
from runtimes.onnxruntime_ import OnnxRuntimeSession
from tools.bench_backends import BASE, main, measure


def test_every_task_is_timed_on_every_artifact(tiny_bundle: Path, tmp_path: Path) -> None:
    kept = tmp_path / "backends.json"
    assert main([str(tiny_bundle), "--rounds", "1", "--output", str(kept)]) == 0
    found = json.loads(kept.read_text())
    assert set(found["median_seconds"]) == {
        "lm decode, per token", "lm prefill of 64", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder",
    }  # fmt: skip
    labels = [artifact.label for artifact in load_bundle(tiny_bundle).artifacts if artifact.component == "lm"]
    assert list(found["median_seconds"]["lm decode, per token"]) == labels
    assert all(seconds > 0 for row in found["median_seconds"].values() for seconds in row.values())
    assert found["base"] == BASE


def test_what_a_stand_in_runs_has_no_figure(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Emulated(OnnxRuntimeSession):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.stand_in = "an emulator"

    monkeypatch.setattr("runtimes.onnxruntime_.OnnxRuntimeSession", Emulated)
    assert all(not row for row in measure(load_bundle(tiny_bundle), 1, 1).values())
