"""The table over all backends."""

from __future__ import annotations

from runtimes.matrix import parity_matrix
from runtimes.report import Result


def result(backend: str, metric: str, value: float | None, limit: float, source: str, status: str, **changes: str):
    names = {"component": "lm", "form": "ir", "mode": "exact", "gate": "export"} | changes
    return Result(
        names["component"], backend, names["form"], names["mode"], names["gate"], metric, value, limit, source,
        status, "8 samples",  # type: ignore[arg-type]
    )  # fmt: skip


def test_rows_are_components_and_metrics_and_columns_backends() -> None:
    rows = [
        result("onnx", "mean_kl", 1e-11, 1e-4, "profile kl", "passed", form="fused"),
        result("openvino", "mean_kl", 2e-9, 1e-4, "profile kl", "passed"),
        result("openvino", "mean_kl", 3e-3, 2e-2, "10 x noise floor", "passed", mode="fast", gate="export-fast"),
        result("coreml", "snr", None, 40.0, "starting limit", "pending-device", component="image_decoder"),
        result("torch", "mean_kl", 0.06, 0.05, "profile", "failed", gate="quantisation-loss"),
    ]
    head, rule, lm, image, *sources = parity_matrix({"host": rows}).splitlines()
    assert head == "| component | metric | onnx | openvino | coreml |"  # the loss gate is no backend's
    assert rule.count("---") == 5
    assert lm == (
        "| lm | mean_kl | `fused/exact` 1e-11 (≤ 0.0001 a): passed | `ir/exact` 2e-09 (≤ 0.0001 a): passed<br>"
        "`ir/fast` 0.003 (≤ 0.02 b): passed |  |"
    )
    assert image == "| image_decoder | snr |  |  | `ir/exact` not run (≥ 40 c): pending-device |"
    assert sources[-3:] == ["- a: profile kl", "- b: 10 x noise floor", "- c: starting limit"]


def test_lines_of_several_bundles_name_their_profile() -> None:
    row = result("tvm", "mean_kl", 1e-9, 1e-4, "profile kl", "proxy", form="compiled")
    assert "proxy on raspberry-pi-5" in parity_matrix({"host": [], "raspberry-pi-5": [row]})
