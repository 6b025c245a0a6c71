"""The order of a device's one step: what is built, kept, refused and recorded, and what is asked first."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles import load_profile
from runtimes import engines
from runtimes.bundle import Artifact, Bundle, load_bundle
from runtimes.engines import Machine
from runtimes.engines_build import BuildFailed, NeedsPackage, ParserRejected, build_with_trtexec, find_trtexec
from runtimes.errors import Fault
from runtimes.finalize import WrongDevice, check_device, ensure_engines, with_identity
from runtimes.report import Result
from runtimes.session import OutOfDeviceMemory
from runtimes.tensorrt_log import failure
from tests.runtimes.engine_maker import tiny_engine_bundle

ORIN = Machine("TensorRT 10.3.0", "sm_87", "Orin", "ab" * 16, "12.6", "linux aarch64")
RTX = Machine("TensorRT-RTX 1.7.1.116", "sm_89", "NVIDIA GeForce RTX 4090", "cd" * 16, "13.0", "linux x86_64")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_engine_bundle(tmp_path / "bundle")


class Builder:
    """Stands where TensorRT builds: an engine is the component's name, and everything asked for is kept."""

    def __init__(self, **faults: Fault) -> None:
        self.asked: list[str] = []
        self._faults = faults

    def __call__(self, artifact: Artifact) -> tuple[bytes, str]:
        self.asked.append(artifact.component)
        if artifact.component in self._faults:
            raise self._faults[artifact.component]
        return artifact.component.encode(), "none"


def ensure(bundle: Bundle, builder: Builder, machine: Machine = ORIN) -> list[Fault]:
    return ensure_engines(bundle, bundle.artifacts, machine, builder)


def test_a_second_run_builds_nothing(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Builder(), Builder()
    assert ensure(bundle, first) == [] and first.asked == ["lm", "audio_decoder"]
    said = capsys.readouterr().out
    assert "lm (tensorrt/typed/fp16): built" in said and "nothing to build" not in said
    before = {path: path.stat().st_mtime_ns for path in (bundle.folder / engines.FOLDER).iterdir()}
    assert ensure(bundle, second) == [] and second.asked == []
    assert "the engine is there" in (said := capsys.readouterr().out) and "nothing to build" in said
    assert {path: path.stat().st_mtime_ns for path in (bundle.folder / engines.FOLDER).iterdir()} == before
    load_bundle(bundle.folder).verify()


def test_only_the_stale_engine_is_built_again(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    ensure(bundle, Builder())
    engines.engine_path(bundle, bundle.artifact("lm")).write_bytes(b"LM")
    again = Builder()
    assert ensure(bundle, again) == [] and again.asked == ["lm"]
    assert "to be built again: does not have the SHA-256" in capsys.readouterr().out
    assert engines.read(bundle, bundle.artifact("lm"), ORIN) == b"lm"


@pytest.mark.parametrize("field", ["compiler", "sm", "gpu", "uuid", "cuda", "system"])
def test_another_machine_builds_its_own(bundle: Bundle, field: str) -> None:
    ensure(bundle, Builder())
    again = Builder()
    other = replace(ORIN, **{field: "TensorRT 10.3.1" if field == "compiler" else "other"})
    assert ensure(bundle, again, other) == [] and again.asked == ["lm", "audio_decoder"]


def test_one_that_cannot_be_built_does_not_keep_the_others(bundle: Bundle) -> None:
    fault = ParserRejected("the parser rejects node n (Op): why", "lm")
    builder = Builder(lm=fault)
    assert ensure(bundle, builder) == [fault] and builder.asked == ["lm", "audio_decoder"]
    assert not engines.held(bundle, bundle.artifact("lm")) and engines.held(bundle, bundle.artifact("audio_decoder"))


def test_an_old_engine_is_kept_until_there_is_a_new_one(bundle: Bundle) -> None:
    """A build that fails, as for want of memory, costs nothing that was there."""
    ensure(bundle, Builder())
    newer = replace(ORIN, cuda="12.8")
    assert ensure(bundle, Builder(lm=OutOfDeviceMemory("out of memory while building", "lm")), newer)
    assert engines.read(bundle, bundle.artifact("lm"), ORIN) == b"lm"


def test_engines_of_the_bundle_are_checked_and_never_built(tmp_path: Path) -> None:
    rtx = tiny_engine_bundle(tmp_path / "rtx", rtx=True)
    builder = Builder()
    assert ensure(rtx, builder, RTX) == [] and builder.asked == []
    rtx.file(rtx.artifact("lm").options["engine"]).write_bytes(b"another")
    [fault] = ensure(rtx, builder, RTX)
    assert "does not have the SHA-256" in str(fault) and builder.asked == []
    assert [f.what.split(",")[0] for f in ensure(rtx, builder, replace(RTX, sm="sm_120"))] == [
        "was built for sm sm_89"
    ] * 2


def test_native_files_from_elsewhere_go_before_anything_is_built(bundle: Bundle) -> None:
    library = bundle.folder / engines.PLUGINS
    library.parent.mkdir()
    library.write_bytes(b"edge-build:whatever")
    seen: list[bool] = []

    def build(artifact: Artifact) -> tuple[bytes, str]:
        seen.append(library.exists())
        return b"engine", "none"

    ensure_engines(bundle, bundle.artifacts, ORIN, build)
    assert seen == [False, False]


# The profile


@pytest.mark.parametrize(
    ("profile", "machine", "compiler", "words"),
    [
        ("rtx-4090", RTX, "TensorRT 10.3.0", "runtime is TensorRT, the profile has TensorRT-RTX"),
        ("jetson-orin", ORIN, "TensorRT-RTX 10.3.0", "runtime is TensorRT-RTX, the profile has TensorRT"),
        ("rtx-4090", RTX, "TensorRT-RTX 1.8.0.1", "TensorRT-RTX is 1.8.0.1, the profile has 1.7.1.116"),
    ],
)  # fmt: skip
def test_tensorrt_and_tensorrt_rtx_are_not_taken_for_each_other(
    profile: str, machine: Machine, compiler: str, words: str
) -> None:
    with pytest.raises(WrongDevice, match=words) as caught:
        check_device(load_profile(profile).as_dict(), replace(machine, compiler=compiler))
    assert "Install TensorRT" in caught.value.way_out


@pytest.mark.parametrize(
    "profile", [{}, {"name": "x"}, {"name": "x", "sm": 87}, {"name": None, "tensorrt_version": []}]
)
def test_a_profile_that_says_nothing_fits_nothing(profile: dict[str, object]) -> None:
    with pytest.raises(WrongDevice, match=r"sm is sm_87, the profile has (none|87)"):
        check_device(profile, ORIN)


# The report


def row(**changes: object) -> Result:
    fields = {
        "component": "lm", "backend": "tensorrt", "form": "typed", "mode": "fp16", "gate": "export", "metric": "kl",
        "value": 1e-6, "limit": 1e-4, "limit_source": "profile", "status": "passed", "where": "64 rows",
    }  # fmt: skip
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


IDENTITY = "on Orin, sm_87, TensorRT 10.3.0, driver for CUDA 12.6, linux aarch64"


def test_rows_of_the_engine_name_the_device() -> None:
    failed = row(metric="same_top", status="failed")
    parsed = row(gate="compiled", metric="parsed", value=None, status="pending-device", where="by nobody")
    found = with_identity([row(), failed, parsed], ORIN)
    assert [each.where for each in found[:2]] == [f"64 rows; {IDENTITY}"] * 2
    assert (found[2].status, found[2].value, found[2].where) == ("passed", 1.0, f"by TensorRT 10.3.0 {IDENTITY}")


@pytest.mark.parametrize(
    "untouched",
    [
        row(status="proxy"),
        row(status="pending-device", value=None),
        row(gate="quantisation-loss", backend="torch", form="reference", mode="exact"),
        row(gate="inheritance", metric="identical"),
        row(gate="compiled", metric="layers", status="proxy"),
        row(gate="compiled", metric="parsed", status="proxy", form="fused"),
    ],
)
def test_rows_of_anything_else_stay_as_they_are(untouched: Result) -> None:
    assert with_identity([untouched, row(metric="other")], ORIN)[0] == untouched


# trtexec, and what TensorRT says


def test_a_program_that_is_not_trtexec(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    for tool, words in ((tmp_path / "nowhere", "is not there"), (tmp_path / "plain", "no program"),
                        (Path(sys.executable), "does not say its version")):  # fmt: skip
        with pytest.raises(BuildFailed, match=words) as caught:
            find_trtexec(tool)
        assert "/usr/src/tensorrt/bin/trtexec" in caught.value.way_out


def test_artifacts_with_plugins_are_not_for_trtexec(bundle: Bundle) -> None:
    artifact = replace(bundle.artifact("lm"), options={**bundle.artifact("lm").options, "plugins": ["EdgeLinear"]})
    with pytest.raises(NeedsPackage, match="Python package"):
        build_with_trtexec(bundle, artifact, sys.executable)


def test_a_command_that_fails_is_told_by_its_last_words(bundle: Bundle) -> None:
    with pytest.raises(BuildFailed, match=r"no engine: .*onnx"):
        build_with_trtexec(bundle, bundle.artifact("lm"), sys.executable)  # Python knows no --onnx
    assert not (bundle.folder / engines.FOLDER).exists()


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("[E] Error[1]: [defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)", True),
        ("Requested amount of GPU memory (9663676416 bytes) could not be allocated. There may not be enough free "
         "memory for allocation to succeed.", True),
        ("[E] Error[2]: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (Requested size was "
         "4294967296 bytes.)", True),
        ("CUDA error 2: cudaErrorMemoryAllocation", True),
        ("Error Code 10: Internal Error (Could not find any implementation for node /layers.0/MatMul.)", False),
        ("Error Code 9: API Usage Error (Target GPU SM 70 is not supported by this TensorRT release.)", False),
        ("", False),
    ],
)  # fmt: skip
def test_out_of_memory_is_named_with_its_stage(message: str, memory: bool) -> None:
    other = BuildFailed("no engine", "lm")
    found = failure([message] if message else [], "building", "lm", other)
    if memory:
        assert isinstance(found, OutOfDeviceMemory) and "out of memory while building" in str(found)
    else:
        assert found is other
