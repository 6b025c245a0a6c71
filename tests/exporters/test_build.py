"""The build command: reuse, rebuilds, identical results, gates, refusals with one message, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles import list_profiles, load_profile
from exporters.build import GateFailed, Request, build, main
from exporters.errors import ExportError, PackageError
from runtimes.bundle import BundleError, load_bundle
from runtimes.report import read_report
from tests.conftest import MakeStudent
from tests.exporters.plain import hidden, one_form, text_only, write_plain
from tests.malformed.packages import copy_package, relist


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def built(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A request whose bundle is there; copy the bundle before changing it."""
    request = Request(one_form(), plain, None, tmp_path_factory.mktemp("built") / "bundle", bench=False)
    assert not build(request)[2]
    return request


@pytest.fixture
def copied(built: Request, tmp_path: Path) -> Request:
    """The same in folders of its own."""
    package = shutil.copytree(built.package, tmp_path / built.package.name)
    return replace(built, package=package, output=shutil.copytree(built.output, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report; the manifest without the time."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["report.json"], files["report.md"]
    manifest = json.loads(files["manifest.json"])
    del manifest["created"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_bundle_is_whole_and_reported(built: Request) -> None:
    bundle = load_bundle(built.output)
    bundle.verify()
    report = read_report(bundle.folder)
    assert report.results and not report.failed
    assert [artifact.label for artifact in bundle.artifacts] == ["onnx/fused/exact"]
    assert bundle.artifacts[0].preferred
    assert bundle.student.sha256 and bundle.context == 96
    assert hidden(built.output.parent) == []


def test_a_second_build_with_nothing_changed_reuses_the_first(built: Request) -> None:
    stages: list[str] = []
    before = (built.output / "manifest.json").stat()
    bundle, report, reused = build(built, lambda stage, size: stages.append(stage))
    assert reused and set(stages) == {"check packages"}
    assert bundle.folder == built.output and report.results
    assert (built.output / "manifest.json").stat() == before


def change_one_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda request: change_one_byte(next(request.package.glob("*.safetensors"))),
        lambda request: change_one_byte(request.output / "onnx" / "lm.data"),
    ],
    ids=["a byte of the package", "a byte of the bundle"],
)
def test_a_changed_byte_is_built_anew(copied: Request, change: Callable[[Request], None]) -> None:
    change(copied)
    bundle, _, reused = build(copied)
    assert not reused
    bundle.verify()


def test_another_option_is_another_bundle(copied: Request) -> None:
    before = load_bundle(copied.output).build_key
    bundle, _, reused = build(replace(copied, context=80))
    assert not reused and bundle.context == 80 and bundle.build_key != before


def test_two_builds_of_one_input_are_identical(built: Request, tmp_path: Path) -> None:
    again = replace(built, output=tmp_path / "elsewhere" / "again")
    assert not build(again)[2]
    assert contents(again.output) == contents(built.output)


@pytest.mark.long
def test_two_builds_of_a_whole_student_are_identical(
    tiny_bundle: Path, tiny_student: Path, make_tiny_student: MakeStudent, tmp_path: Path
) -> None:
    moved = copy_package(tiny_student, tmp_path / "student")  # where it lies must not matter
    floating = make_tiny_student(variant="float")
    output = tmp_path / "again"
    request = Request(load_profile("host"), moved, floating, output, ("onnx",), bench=False, allow_failed=True)
    build(request)
    assert contents(request.output) == contents(tiny_bundle)


# --- gates ----------------------------------------------------------------------------------------------------------


def test_a_gate_that_fails_publishes_nothing(built: Request, tmp_path: Path) -> None:
    request = replace(built, profile=replace(built.profile, same_top=1.01), output=tmp_path / "bundle")
    with pytest.raises(GateFailed) as caught:
        build(request)
    assert list(tmp_path.iterdir()) == []
    assert caught.value.where == "lm onnx/fused/exact"
    assert re.match(r"1 of \d+ gates fail, the first: export same_top = 1\.0 against 1\.01", caught.value.what)
    assert "--allow-failed" in caught.value.way_out
    assert [row.metric for row in caught.value.report.failed] == ["same_top"]


def test_a_gate_that_fails_leaves_the_old_bundle(copied: Request) -> None:
    before = contents(copied.output)
    with pytest.raises(GateFailed):
        build(replace(copied, profile=replace(copied.profile, same_top=1.01)))
    assert contents(copied.output) == before
    load_bundle(copied.output).verify()


def test_allow_failed_publishes_with_the_failed_row(built: Request, tmp_path: Path) -> None:
    profile = replace(built.profile, same_top=1.01)
    request = replace(built, profile=profile, output=tmp_path / "bundle", allow_failed=True)
    bundle, report, reused = build(request)
    assert not reused
    bundle.verify()
    [row] = read_report(bundle.folder).failed
    assert row in report.failed
    assert (row.component, row.gate, row.metric, row.status) == ("lm", "export", "same_top", "failed")
    # What did not hold is never reused.
    assert not build(replace(request, allow_failed=True))[2]


def test_the_command_ends_with_1_when_a_gate_fails(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits so sharp that int8 activations change them beyond the limit of the fast mode."""
    package = text_only(tiny_student, tmp_path / "sharp", sharpness=40)
    arguments = ["--profile", "host", "--package", str(package), "--output", str(tmp_path / "out"), "--no-bench"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: lm onnx/fused/fast: ") and said.err.count("\n") == 1
    assert "failed" in said.out
    assert not (tmp_path / "out").exists() and hidden(tmp_path) == []


# --- what stands still while it is built ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["export lm for onnx", "golden outputs of lm"])
def test_a_package_that_changes_during_the_build_is_caught(copied: Request, stage: str) -> None:
    [weights] = copied.package.glob("*.safetensors")

    def interfere(name: str, size: int) -> None:
        if name == stage:
            change_one_byte(weights)

    output = copied.output.with_name("new")
    with pytest.raises(PackageError, match="changed while it was being read") as caught:
        build(replace(copied, output=output), interfere)
    assert caught.value.where == weights.name
    assert not output.exists() and hidden(output.parent) == []


def test_an_older_student_does_not_replace_a_newer_one(copied: Request) -> None:
    path = copied.output / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["student"]["version"] = "0.0.1"
    path.write_text(json.dumps(manifest | {"build_key": "0" * 64}))
    with pytest.raises(BundleError, match=rf"holds {copied.package.name} 0\.0\.1, newer than 0\.0\.0"):
        build(copied)
    assert json.loads(path.read_text())["student"]["version"] == "0.0.1"
    assert build(replace(copied, allow_downgrade=True))[0].student.version == "0.0.0"


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_builds_and_reuses(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--profile", "host", "--package", str(plain), "--output", str(tmp_path / "out"), "--no-bench"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "Published" in first and "onnx/fused/exact *" in first and "Not made here" not in first
    assert "openvino/ir/exact" in first and "tvm/compiled/exact" in first
    assert main(arguments) == 0
    assert "Unchanged, reused" in capsys.readouterr().out


def test_a_dry_run_predicts_and_writes_nothing(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "below" / "out"
    arguments = ["--profile", "raspberry-pi-5", "--package", str(plain), "--output", str(output), "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "Prediction (not a measurement)" in said and "tokens/s" in said and "onnx/fused/exact" in said
    assert list(tmp_path.iterdir()) == []


def test_every_profile_is_listed_by_the_name_one_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-profiles"]) == 0
    said = capsys.readouterr().out
    assert [name for name in list_profiles() if name not in said] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "raspberry-pi-4"], "Did you mean raspberry-pi-5?"),
        (["--profile", "../host"], "is not the name of a profile"),
        (["--profile", "host", "--backends", "onnx,onx"], "unknown backend 'onx'"),
        (["--profile", "host", "--backends", "tensorrt"], "nothing can be made for"),
        (["--profile", "host", "--package", "no/such/folder"], "no/such/folder"),
        (["--profile", "host", "--package", "{plain}", "--context", "7"], "7 positions are too few"),
        (["--profile", "host", "--package", "{plain}", "--context", "7", "--dry-run"], "7 positions are too few"),
        (["--profile", "host", "--package", "{plain}", "--output", "{file}"], "is not a bundle"),
        (["--profile", "host", "--package", "{int4}", "--float-package", "{int4}"], "is quantised itself"),
        (["--profile", "host", "--package", "{plain}", "--float-package", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_refusal_is_one_message_and_status_2(
    arguments: list[str], message: str, plain: Path, tiny_student: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "something"
    file.write_text("else")
    filled = [argument.format(plain=plain, file=file, int4=tiny_student) for argument in arguments]
    if "--output" not in filled:
        filled += ["--output", str(tmp_path / "out")]
    assert main(filled) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "Traceback" not in said.err and not said.out.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--profile is required; there are: "),
        (["--profile", "host", "--context", "0"], "--context must be at least 1"),
        (["--profile", "host", "--variant", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_package_that_does_not_hold_together_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    package = copy_package(tiny_student, tmp_path / "student")
    change_one_byte(next(package.glob("*.safetensors")))
    output = tmp_path / "out"
    with pytest.raises(PackageError, match="SHA-256 differs"):
        build(Request(one_form(), package, None, output, bench=False))
    relist(package)
    (package / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json"):
        build(Request(one_form(), package, None, output, bench=False))
    assert not output.exists()
