"""Parity from a bundle alone: a good bundle passes every gate, and each kind of damage fails the gate meant for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle import Bundle, load_bundle
from runtimes.errors import Fault
from runtimes.gates import export_gate
from runtimes.parity import Selection, check, main
from runtimes.report import Result, read_report
from tests.runtimes.bundle_edits import copy_bundle, edit_fields, edit_golden

COMPONENTS = {"lm", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder"}


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy whose float student is near the quantised one: random weights lose too much to be a passing case."""
    folder = copy_bundle(tiny_bundle, tmp_path / "bundle")

    def near(tensors: dict[str, np.ndarray]) -> None:
        noise = np.random.default_rng(0).normal(0, 1e-3, tensors["logits"].shape)
        tensors["float_logits"] = (tensors["logits"] + noise).astype(np.float32)

    edit_golden(folder, "lm", near)
    return folder


def rows(bundle: Bundle, component: str, **selection: str) -> dict[tuple[str, str], Result]:
    """(gate, metric) -> row of the preferred artifact and of the gates that have no artifact of their own."""
    found = check(bundle, Selection(component=component, threads=1, **selection))
    preferred = bundle.artifact(component)
    kept = [row for row in found if (row.form, row.mode) == (preferred.form, preferred.mode) or row.backend == "torch"]
    return {(row.gate, row.metric): row for row in kept}


def failed(found: dict[tuple[str, str], Result]) -> set[tuple[str, str]]:
    return {key for key, row in found.items() if row.status == "failed"}


def test_the_command_passes_and_reports(folder: Path) -> None:
    command = [sys.executable, "-m", "runtimes.parity", str(folder), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_report(folder).results
    assert {row.component for row in results} == COMPONENTS
    assert {row.gate for row in results} >= {"export", "quantisation-loss", "inheritance"}
    assert all(row.value is not None and row.limit_source and row.where for row in results)
    assert "passed" in done.stdout
    load_bundle(folder).verify()


def test_every_metric_of_a_component_has_its_limit(folder: Path) -> None:
    bundle = load_bundle(folder)
    lm = rows(bundle, "lm")
    export = {metric for gate, metric in lm if gate == "export"}
    assert export == {"mean_kl", "p999_kl", "same_top"}
    assert {m for g, m in lm if g == "quantisation-loss"} >= {"mean_kl", "same_top", "p999_kl", "mean_kl/image"}
    assert {m for _, m in rows(bundle, "image_decoder")} == {"relative_max_error", "psnr", "ssim"}
    assert {m for _, m in rows(bundle, "audio_decoder")} == {"relative_max_error", "si_snr"}
    assert {m for _, m in rows(bundle, "audio_encoder")} == {"codes_equal"}


def test_a_wrong_token_late_in_decoding_fails_and_is_placed(folder: Path) -> None:
    def flip(tensors: dict[str, np.ndarray]) -> None:
        row = tensors["logits"][1, 40]
        row[(row.argmax() + 1) % row.size] = row.max() + 5

    found = rows(edit_golden(folder, "lm", flip), "lm")
    assert ("export", "mean_kl") in failed(found)
    assert "first at sample 1 step 40 (margin 5" in found["export", "same_top"].where
    assert main([str(folder), "--component", "lm", "--threads", "1"]) == 1


def test_noise_that_flips_a_tie_is_no_fault(folder: Path) -> None:
    def tie(tensors: dict[str, np.ndarray]) -> None:
        row = tensors["logits"][0, 10]
        # The reference now prefers its runner-up by a hair, which the artifact does not.
        row[np.argsort(row)[-2]] = row.max() + 1e-6 * np.abs(row).max()
        assert np.partition(row, -2)[-2] < row.max()

    found = rows(edit_golden(folder, "lm", tie), "lm")
    row = found["export", "same_top"]
    assert row.value == 1.0
    assert "1 of them ties" in row.where


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("logits"), "holds no 'logits'"),
        (lambda t: (t.update(logits=t["logits"][:, :63]), t.pop("float_logits")), "63 steps"),
        (lambda t: t.update(prompt=np.full_like(t["prompt"], t["prompt"].min())), "1 prompt length"),
        (lambda t: t.update(ids=t["ids"][:, :5]), "longer than its ids"),
        (lambda t: t.update(ids=np.full_like(t["ids"], 10**6)), "outside 0.."),
    ],
    ids=["no logits", "few steps", "one length", "short ids", "unknown tokens"],
)
def test_golden_outputs_that_cannot_hold_the_gate_fail_it(folder: Path, change: object, text: str) -> None:
    bundle = edit_golden(folder, "lm", change)  # type: ignore[arg-type]
    row = rows(bundle, "lm")["export", "mean_kl"]
    assert (row.status, row.value) == ("failed", None)
    assert text in row.where


def test_the_loss_is_told_per_modality(folder: Path) -> None:
    bundle = load_bundle(folder)
    image = bundle.modalities["image"]

    def worsen_images(tensors: dict[str, np.ndarray]) -> None:
        targets = np.take_along_axis(
            tensors["ids"], tensors["prompt"][:, None] + np.arange(tensors["logits"].shape[1]), axis=1
        )
        rows = (targets >= image.first) & (targets < image.end)
        assert rows.any()
        tensors["float_logits"][rows] = -3 * tensors["logits"][rows]

    found = rows(edit_golden(folder, "lm", worsen_images), "lm")
    assert failed(found) >= {("quantisation-loss", "mean_kl/image"), ("quantisation-loss", "same_top/image")}
    others = {key for key in found if key[0] == "quantisation-loss" and key[1].endswith(("/text", "/audio"))}
    assert not failed(found) & others
    assert not {key for key in failed(found) if key[0] == "export"}


@pytest.mark.parametrize("component", ["image_decoder", "audio_decoder"])
@pytest.mark.parametrize(("value", "text"), [(0.25, "is constant"), (np.nan, "NaN")])
def test_an_output_without_content_fails_before_any_metric(
    folder: Path, component: str, value: float, text: str
) -> None:
    def blank(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.startswith("case0.expected."))
        tensors[name][...] = value

    found = rows(edit_golden(folder, component, blank), component)
    assert failed(found) == set(found)
    assert all(row.value is None and text in row.where for row in found.values())


@pytest.mark.parametrize("component", ["image_decoder", "audio_decoder"])
def test_a_difference_at_the_last_shape_alone_fails(folder: Path, component: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = max(name for name in tensors if ".expected." in name)
        tensors[name].flat[-1] += 0.01 * np.abs(tensors[name]).max()

    found = rows(edit_golden(folder, component, change), component)
    assert failed(found) == {("export", "relative_max_error")}
    assert "worst in case" in found["export", "relative_max_error"].where


@pytest.mark.parametrize("component", ["image_encoder", "audio_encoder"])
def test_other_codes_fail(folder: Path, component: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        codes = next(tensors[name] for name in sorted(tensors) if ".expected." in name)
        codes[...] = (codes + 1) % 7

    found = rows(edit_golden(folder, component, change), component)
    assert failed(found) == {("export", "codes_equal")}
    assert "first in case0" in found["export", "codes_equal"].where


def test_codes_that_were_not_inherited_fail(folder: Path) -> None:
    def lose(fields: dict) -> None:
        fields["inheritance"] = {"identical": 3, "total": 4, "mismatches": ["model.norm"]}

    row = rows(edit_fields(folder, lose), "lm")["inheritance", "identical"]
    assert (row.status, row.value, row.limit) == ("failed", 3.0, 4.0)
    assert "model.norm" in row.where


def test_the_manifests_tolerance_takes_the_place_of_the_starting_limit(folder: Path) -> None:
    def tighten(fields: dict) -> None:
        fields["tolerances"] = [
            {"component": "lm", "gate": "export", "metric": "same_top", "limit": 1.5, "source": "nothing can hold this"}
        ]

    found = rows(edit_fields(folder, tighten), "lm")
    assert failed(found) == {("export", "same_top")}
    assert found["export", "same_top"].limit_source == "nothing can hold this"


def test_on_a_stand_in_a_pass_is_a_proxy_and_names_it(folder: Path) -> None:
    found = rows(load_bundle(folder), "image_decoder", stand_in="this laptop")
    assert {row.status for row in found.values()} == {"proxy"}
    assert all("this laptop" in row.where for row in found.values())


def test_an_artifact_whose_backend_is_not_here_stays_pending(folder: Path) -> None:
    def elsewhere(fields: dict) -> None:
        for artifact in fields["artifacts"]:
            if artifact["component"] == "image_decoder":
                artifact["backend"] = "abacus"

    found = rows(edit_fields(folder, elsewhere), "image_decoder")
    assert {row.status for row in found.values()} == {"pending-device"}
    assert all(row.value is None and "abacus" in row.where for row in found.values())


def test_selecting_nothing_lists_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Fault, match=r"no artifact matches.*lm onnx"):
        check(load_bundle(folder), Selection(backend="tvm"))
    assert main([str(folder), "--backend", "tvm"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_changed_file_is_refused_before_it_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / load_bundle(folder).artifact("lm").model
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    assert main([str(folder)]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (folder / "report.json").exists()


def test_the_gate_of_a_fast_mode_follows_what_it_computes_in(tiny_bundle: Path) -> None:
    artifact = load_bundle(tiny_bundle).artifact("lm", mode="fast")
    assert export_gate(artifact) == export_gate(artifact, {"precision": "f32"}) == "export-fast"
    assert export_gate(artifact, {"precision": "bf16"}) == "export-bf16"
    assert export_gate(artifact, {"precision": "f16"}) == "export-fp16"
    exact = load_bundle(tiny_bundle).artifact("lm", mode="exact")
    assert export_gate(exact, {"precision": "bf16"}) == "export"  # never a way around its limits
    for form in ("int8", "palettised"):  # quantised by the build: judged as such, in whatever it computes
        assert export_gate(replace(artifact, form=form), {"precision": "bf16"}) == f"export-{form}"
