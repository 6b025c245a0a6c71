"""Planning: what is made and left out, and what is refused before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles import Profile, load_profile
from exporters import stages
from exporters.build import quiet
from exporters.errors import ExportError
from exporters.plan import Forecast, PlanError, check_backends, check_fit, forecast, plan_entries, state_bytes
from runtimes.bundle import load_bundle
from tests.conftest import MakeStudent
from tests.exporters.conftest import ExportLm
from tests.exporters.plain import one_form, text_only, write_plain


@pytest.fixture(scope="module")
def host() -> Profile:
    return load_profile("host")


def test_what_a_profile_names_is_made_or_has_a_reason(exported_lm: ExportLm, host: Profile) -> None:
    entries = plan_entries(host, exported_lm("int4").program, None)
    assert [entry.label for entry in entries] == list(host.components["lm"])
    assert {entry.left_out for entry in entries} == {""}
    orin = {e.label: e.left_out for e in plan_entries(load_profile("jetson-orin"), exported_lm("int4").program, None)}
    assert set(orin.values()) == {""} and {"tensorrt/fused/fp16", "tensorrt/typed/fp16"} < set(orin)


def test_backends_that_were_not_asked_for_are_left_out(exported_lm: ExportLm, host: Profile) -> None:
    program = exported_lm("int4").program
    assert {e.left_out for e in plan_entries(host, program, ["onnx"]) if e.backend != "onnx"} == {
        "not among --backends"
    }
    with pytest.raises(PlanError, match=r"nothing can be made for lm \(onnx/fused/exact: not among --backends"):
        plan_entries(host, program, ["coreml"])


def test_float_weights_have_no_fast_mode(exported_lm: ExportLm, host: Profile) -> None:
    reasons = {e.label: e.left_out for e in plan_entries(host, exported_lm("float").program, None)}
    assert reasons["onnx/fused/fast"] == "float weights have no fast mode"
    assert reasons["onnx/fused/exact"] == reasons["onnx/standard/exact"] == ""


def test_an_older_opset_leaves_the_newer_form_out(exported_lm: ExportLm, host: Profile) -> None:
    program = exported_lm("int4").program
    older = {e.label: e.left_out for e in plan_entries(replace(host, onnx_opset=23), program, None)}
    assert "needs opset 24, the profile has 23" in older["onnx/standard/exact"]
    assert older["onnx/fused/exact"] == ""
    with pytest.raises(PlanError, match="needs opset 23, the profile has 18"):
        plan_entries(replace(host, onnx_opset=18), program, ["onnx"])


def test_a_profile_without_the_component_is_refused(exported_lm: ExportLm, host: Profile) -> None:
    with pytest.raises(PlanError, match="lists no artifact for it") as caught:
        plan_entries(replace(host, components={}), exported_lm("int4").program, None)
    assert caught.value.where == "profile host"


def test_backends_are_known() -> None:
    assert check_backends(["onnx", "tvm"]) == ("onnx", "tvm")
    with pytest.raises(PlanError, match=r"unknown backend 'onx'.*Known: onnx, openvino"):
        check_backends(["onnx", "onx"])


def test_the_forecast_is_near_the_real_bundle(
    tiny_student: Path, make_tiny_student: MakeStudent, tiny_bundle: Path, host: Profile
) -> None:
    planned = stages.plan(tiny_student, make_tiny_student(variant="float"), host, ["onnx"], None, quiet)
    real = sum(file.size for file in load_bundle(tiny_bundle).files.values())
    assert abs(planned.forecast.bundle_bytes / real - 1) < 0.25
    assert planned.capacity == 256
    weights = load_bundle(tiny_bundle).artifact("lm").bytes_per_token
    cache = sum(state_bytes(planned.programs["lm"]))
    assert planned.forecast.bytes_per_token == weights + cache // 2


def test_speed_is_bandwidth_over_bytes_and_unknown_without_it(exported_lm: ExportLm, host: Profile) -> None:
    program = exported_lm("int4").program
    assert forecast(host, [program], 0).tokens_per_second is None
    found = forecast(replace(host, bandwidth_bytes_per_s=10**9), [program], 1000)
    assert found.tokens_per_second == pytest.approx(1e9 / found.bytes_per_token)
    weights = sum(constant.nbytes for constant in program.constants.values())
    cache = sum(4 * state.shape[1] * state.shape[2] * state.shape[3] for state in program.states)
    assert found.bundle_bytes == weights + 1000
    backends = [("onnx", "fused"), ("openvino", "ir"), ("tvm", "compiled")]
    assert forecast(host, [program], 1000, {"lm": backends}).bundle_bytes == 3 * weights + 1000
    codes = sum(c.nbytes for name, c in program.constants.items() if name.endswith((".codes", ".scales", ".zeros")))
    further = forecast(host, [program], 1000, {"lm": [*backends, ("onnx", "standard")]})
    assert further.bundle_bytes == 3 * weights + codes + 1000
    assert sum(state_bytes(program)) == cache
    # A step reads every weight but the RoPE tables, of which attention takes a row, and a cache that is half full.
    tables = sum(program.constants[f"model.rotary_emb.{name}"].nbytes for name in ("cos", "sin"))
    assert found.bytes_per_token == weights - tables + cache // 2
    assert found.memory_bytes > 2 * weights + cache


@pytest.mark.parametrize(
    ("key", "what"),
    [("bundle_bytes", "the bundle"), ("rss_bytes", "the process"), ("memory_visible_bytes", "the process")],
)
def test_what_cannot_fit_is_refused(key: str, what: str, host: Profile) -> None:
    roomy = replace(host, bundle_bytes=10**12, rss_bytes=10**12, memory_visible_bytes=10**12)
    prediction = Forecast(3_000_000, 5_000_000, None, None)
    check_fit(roomy, prediction)
    check_fit(replace(roomy, memory_visible_bytes=None), prediction)
    predicted = 3_000_000 if key == "bundle_bytes" else 5_000_000
    check_fit(replace(roomy, **{key: predicted}), prediction)
    with pytest.raises(PlanError) as caught:
        check_fit(replace(roomy, **{key: predicted - 1}), prediction)
    assert caught.value.what == f"{what} would take {predicted / 1e6:.1f} MB of {(predicted - 1) / 1e6:.1f} MB ({key})"
    assert caught.value.where == "profile host"


def test_contexts_that_do_not_work_are_refused(tmp_path: Path) -> None:
    package = write_plain(tmp_path / "plain")
    for context, message in ((97, "97 tokens are more than the student's 96"), (71, "71 positions are too few")):
        with pytest.raises(ExportError, match=message):
            stages.plan(package, None, one_form(), None, context, quiet)
    assert stages.plan(package, None, one_form(max_context=80), None, None, quiet).capacity == 80
    assert stages.plan(package, None, one_form(), None, 72, quiet).capacity == 72


def test_the_float_twin_must_be_one(tmp_path: Path, tiny_student: Path, make_tiny_student: MakeStudent) -> None:
    floating = make_tiny_student(variant="float")
    for package, twin, message in (
        (tiny_student, tiny_student, r"--float-package .*: is quantised itself"),
        (floating, floating, "the student is a float one itself"),
        (tiny_student, write_plain(tmp_path / "plain"), r"--float-package .*: has .* \S+, the student \S+"),
        (tiny_student, text_only(floating, tmp_path / "text", tokenizer=False), "has another tokenizer"),
    ):
        with pytest.raises(ExportError, match=message):
            stages.plan(package, twin, one_form(), None, None, quiet)
