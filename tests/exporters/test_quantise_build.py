"""The whole command on a float student: quantised, proven, and what it lost in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.quantise import Quantise
from exporters.build import Request, build, main
from runtimes.bundle import load_bundle
from runtimes.report import read_report
from tests.conftest import MakeStudent
from tests.exporters.plain import one_form, text_only


@pytest.fixture(scope="module")
def built(make_tiny_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPTQ of a tiny float decoder within a budget that 4 bits alone do not keep."""
    folder = tmp_path_factory.mktemp("quantised")
    package = make_tiny_student(variant="float")
    data = folder / "data"
    data.mkdir()
    (data / "rows.safetensors").write_bytes((package / "samples" / "lm.safetensors").read_bytes())
    settings = Quantise(method="gptq", bits=4, mean_kl=0.05)
    plain = text_only(package, folder / "student")
    request = Request(
        one_form(quantise=settings), plain, None, folder / "bundle", bench=False, calibration=data, insist=True
    )
    bundle, _, reused = build(request)
    assert not reused
    assert build(request)[2]
    return bundle.folder


def test_every_artifact_holds_the_codes_that_the_build_made(built):
    bundle, report = load_bundle(built), read_report(built)
    inherited = bundle.inheritance
    assert inherited["total"] > 0
    assert inherited["identical"] == inherited["total"]
    exports = [row for row in report.results if row.gate == "export" and row.component == "lm"]
    assert {row.status for row in exports} == {"passed"}


def test_the_loss_against_the_float_student_is_gated_by_the_budget(built):
    [row] = [r for r in read_report(built).results if (r.gate, r.metric) == ("quantisation-loss", "mean_kl")]
    assert row.limit == 0.05
    assert "quality budget" in row.limit_source
    assert row.value is not None
    assert row.value > 0


def test_the_table_of_matrices_is_in_manifest_report_and_page(built):
    bundle, report = load_bundle(built), read_report(built)
    held = bundle.quantisation
    assert (held["name"], held["method"], held["bits"], held["mean_kl"]) == ("int4-gptq", "gptq", 4, 0.05)
    assert held["measured_kl"] <= 0.05
    assert [row["name"] for row in held["matrices"]] == [row.name for row in report.quantisation]
    assert {row.stored for row in report.quantisation} >= {"int4 g32", "int8 per row"}
    assert all(row.kl is not None for row in report.quantisation)
    page = (built / "report.md").read_text("utf-8")
    assert "## Quantised by the build" in page
    assert "model.layers.0.mlp.down_proj" in page


def test_nothing_of_the_work_stays_in_the_bundle(built):
    assert not list(built.glob(".*"))
    load_bundle(built).verify()


def test_other_data_make_another_bundle(built, tmp_path):
    """The calibration's own bytes are part of the build's key."""
    from exporters.build import _calibration_hashes

    (tmp_path / "rows.safetensors").write_bytes((built.parent / "data" / "rows.safetensors").read_bytes())
    assert _calibration_hashes(tmp_path) == _calibration_hashes(built.parent / "data")
    (tmp_path / "more.txt").write_text("a handwritten seven")
    assert _calibration_hashes(tmp_path) != _calibration_hashes(built.parent / "data")


def test_a_plan_alone_needs_no_calibration(make_tiny_student, tmp_path, capsys):
    package = text_only(make_tiny_student(variant="float"), tmp_path / "plain")
    options = ["--quantise", "int4-gptq", "--backends", "onnx", "--dry-run"]
    assert main(["--profile", "host", "--package", str(package), *options]) == 0
    assert "onnx/fused/fast" in capsys.readouterr().out  # which float weights do not have


def test_rounded_inputs_are_gated_by_what_float64_shows_of_them(make_tiny_student, tmp_path):
    """A value near a tie falls to either side by the order of a sum, so the exact mode's limit follows from that."""
    package = make_tiny_student(variant="float")
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.safetensors").write_bytes((package / "samples" / "lm.safetensors").read_bytes())
    settings = Quantise(method="smoothquant", bits=8, activations="int8")
    plain = text_only(package, tmp_path / "student")
    request = Request(
        one_form(quantise=settings), plain, None, tmp_path / "out", context=96, bench=False, calibration=data
    )
    bundle, report, _ = build(request)
    assert bundle.quantisation["name"] == "w8a8-smoothquant"
    [row] = [r for r in report.results if (r.gate, r.metric) == ("export", "mean_kl")]
    assert row.status == "passed"
    assert row.limit >= request.profile.kl
    assert row.limit == request.profile.kl or "rounded inputs, float32 against float64" in row.limit_source
