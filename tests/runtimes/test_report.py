"""report.json: merging, what it may hold, and writing it whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtimes.gates import Limit, judge
from runtimes.report import (
    Latency,
    Matrix,
    Report,
    ReportError,
    Result,
    markdown,
    print_report,
    read_report,
    write_report,
)
from tests.runtimes.eager_lm import lm_artifact

ROW = Result("lm", "onnx", "fused", "exact", "export", "mean_kl", 2e-6, 1e-4, "starting limit", "passed", "4 samples")
FIGURE = Latency("lm", "onnx", "fused", "exact", "tpot_p50", 0.5, "ms", "valid", "5 x 64 steps")


def test_it_reads_back_as_written(tmp_path: Path) -> None:
    report = Report(
        (ROW, replace(ROW, metric="same_top", value=None, status="pending-device")), {"cpu": "x"}, (FIGURE,)
    )
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_every_row_has_the_columns_of_the_format(tmp_path: Path) -> None:
    matrix = Matrix("model.layers.0.mlp.down_proj", "int4 g32", 4096, None)
    write_report(tmp_path, Report((ROW,), {}, (FIGURE,), (matrix,)))
    raw = json.loads((tmp_path / "report.json").read_text())
    columns = "component backend form mode gate metric value limit limit_source status where"
    assert [" ".join(row) for row in raw["results"]] == [columns]
    assert set(raw) == {"schema", "results", "environment", "latency", "quantisation"}
    assert [" ".join(row) for row in raw["quantisation"]] == ["name stored bytes kl"]
    assert read_report(tmp_path).quantisation == (matrix,)


def test_a_report_of_an_older_build_has_no_table_of_matrices(tmp_path: Path) -> None:
    write_report(tmp_path, Report((ROW,), {}, (FIGURE,)))
    raw = json.loads((tmp_path / "report.json").read_text())
    del raw["quantisation"]
    (tmp_path / "report.json").write_text(json.dumps(raw))
    assert read_report(tmp_path).quantisation == ()


def test_a_new_row_takes_the_place_of_the_one_with_its_key_and_of_no_other() -> None:
    other, fast = replace(ROW, metric="mean_kl/image"), replace(ROW, mode="fast")
    new = replace(ROW, value=3e-4, status="failed")
    merged = Report((ROW, other, fast), {"cpu": "x", "cores": 2}, (FIGURE,)).merged([new], environment={"cpu": "y"})
    assert set(merged.results) == {new, other, fast}
    assert merged.failed == (new,)
    assert merged.environment == {"cpu": "y", "cores": 2}
    assert merged.latency == (FIGURE,)


def test_a_folder_without_a_report_has_an_empty_one(tmp_path: Path) -> None:
    assert read_report(tmp_path) == Report()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": 9}', '{"schema": 1, "results": [{"component": 3}]}', "\xff"]
)
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ReportError, match=r"report\.json: is not a report"):
        read_report(tmp_path)


def test_a_number_that_json_cannot_hold_is_not_written_and_the_old_report_stays(tmp_path: Path) -> None:
    write_report(tmp_path, Report((ROW,)))
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, Report((replace(ROW, value=float("nan")),)))
    assert read_report(tmp_path).results == (ROW,)


def test_the_readable_tables_hold_what_was_not_measured_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    pending = replace(ROW, value=None, status="pending-device", where="no [device] here | yet")
    text = markdown(Report((pending,), {"cpu": "x"}, (FIGURE,)))
    assert "| - | 0.0001 | starting limit | pending-device | no [device] here \\| yet |" in text
    assert "| tpot_p50 | 0.5 | ms | valid |" in text
    print_report(Report((pending,), None, (FIGURE,)))
    printed = capsys.readouterr().out
    assert "pending" in printed
    assert "no [device] here" in printed


@pytest.mark.parametrize(
    ("metric", "value", "limit", "stand_in", "status"),
    [
        ("mean_kl", 1e-5, 1e-4, None, "passed"),
        ("mean_kl", 1e-4, 1e-4, None, "passed"),
        ("mean_kl", 2e-4, 1e-4, None, "failed"),
        ("mean_kl/image", 2e-4, 1e-4, None, "failed"),
        ("same_top", 0.99, 0.995, None, "failed"),
        ("same_top/text", 1.0, 0.995, None, "passed"),
        ("psnr", 60.0, 40.0, None, "passed"),
        ("mean_kl", 1e-5, 1e-4, "a laptop", "proxy"),
        ("mean_kl", 2e-4, 1e-4, "a laptop", "failed"),
        ("mean_kl", None, 1e-4, None, "failed"),
        ("mean_kl", float("nan"), 1e-4, None, "failed"),
        ("relative_max_error", float("inf"), 1e-4, None, "failed"),
        ("same_top", float("nan"), 0.5, None, "failed"),
    ],
)
def test_judging(metric: str, value: float | None, limit: float, stand_in: str | None, status: str) -> None:
    row = judge(lm_artifact(), "export", metric, value, Limit(limit, "test"), "somewhere", stand_in)
    assert row.status == status
    assert (stand_in or "somewhere") in row.where
    assert row.value is None or row.value == value
