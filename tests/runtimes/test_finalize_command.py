"""The whole command: one run at a time, what a killed run leaves, what is refused before anything is read, and, with a
driver over the host's memory and the real TensorRT-RTX, what reaches the report."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runtimes import engines
from runtimes.bundle import Bundle, BundleBusy
from runtimes.finalize import alone
from runtimes.report import read_report
from tests.runtimes.bundle_edits import edit_fields
from tests.runtimes.engine_maker import tiny_engine_bundle
from tests.runtimes.host_driver import needs_headers, with_host_driver


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_engine_bundle(tmp_path / "bundle")


# One at a time, and what a killed run leaves

HOLDER = """
import sys
from pathlib import Path
from runtimes.finalize import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_on_one_bundle(bundle: Bundle) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(bundle.folder)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BundleBusy, match="finished by another process"), alone(bundle.folder):
            pass
        done = run(bundle.folder)
        assert done.returncode == 2 and "is being finished by another process" in done.stderr
        holder.kill()
        holder.wait()
    with alone(bundle.folder):  # a lock ends with whoever held it
        pass


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtimes.finalize", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_a_killed_run_left_is_in_nobodys_way(bundle: Bundle) -> None:
    folder = bundle.folder / engines.FOLDER
    (folder / ".build-abc").mkdir(parents=True)
    (folder / ".build-abc" / "libedge_plugins.so").write_bytes(b"half")
    (folder / ".lm.typed.fp16.engine.new").write_bytes(b"half")
    done = run(bundle.folder)
    assert "is not in the manifest" not in done.stderr and list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["nothing", "a file", "no bundle"])
def test_what_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    if what == "a file":
        path.write_text("x")
    elif what == "no bundle":
        path.mkdir()
    done = run(path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_bundle_of_another_signer_goes_no_further(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    before = sorted(os.listdir(bundle.folder))
    done = run(bundle.folder, "--trust", str(tmp_path / "keys"))
    assert done.returncode == 2 and "libcuda" not in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(bundle.folder)) == before


@pytest.mark.parametrize("flag", ["--backend", "--mode", "--threads"])
def test_options_of_other_commands_are_not_taken_in_silence(bundle: Bundle, flag: str) -> None:
    done = run(bundle.folder, flag, "1")
    assert done.returncode == 2 and f"unrecognized arguments: {flag}" in done.stderr


# The whole command, where the driver is a library over the host's memory and TensorRT-RTX the real one


def on_host(folder: Path, *arguments: str, sm: str = "89") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtimes.finalize", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=with_host_driver(EDGE_SM=sm))


@pytest.fixture
def rtx(tmp_path: Path) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    made = tiny_engine_bundle(tmp_path / "rtx", rtx=True)
    compiled = {"compiler": f"TensorRT-RTX {metadata.version('tensorrt_rtx')}"}

    def edit(fields: dict[str, Any]) -> None:
        fields["profile"] |= {"tensorrt_version": compiled["compiler"], "arch": engines.this_system().split()[1]}
        for artifact in fields["artifacts"]:
            artifact["options"]["compiled"] |= compiled

    return edit_fields(made.folder, edit)


@needs_headers
def test_another_device_is_refused_before_an_engine_is_read(rtx: Bundle) -> None:
    done = on_host(rtx.folder, sm="120")
    assert done.returncode == 2 and "sm is sm_120, the profile has sm_89" in done.stderr
    assert not (rtx.folder / "report.json").exists() and not (rtx.folder / engines.FOLDER).exists()


@needs_headers
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt_version": "TensorRT-RTX 2.0.0.1"}, "the profile has 2.0.0.1. Install TensorRT-RTX 2.0.0.1"),
        ({"tensorrt_version": "10.3"}, "runtime is TensorRT-RTX, the profile has TensorRT"),
        ({"arch": "riscv64"}, "the profile has linux riscv64"),
        ({"cuda_version": "13.0"}, "CUDA of the driver is 12.6, the profile has 13.0 or newer. Update the driver"),
    ],
)
def test_other_software_is_refused(rtx: Bundle, change: dict[str, str], words: str) -> None:
    edit_fields(rtx.folder, lambda fields: fields["profile"].update(change))
    done = on_host(rtx.folder)
    assert done.returncode == 2 and words in done.stderr
    assert not (rtx.folder / "report.json").exists()


@needs_headers
def test_one_bit_of_an_engine_that_came_along(rtx: Bundle) -> None:
    path = rtx.file(rtx.artifact("lm").options["engine"])
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    done = on_host(rtx.folder)
    assert done.returncode == 2 and "does not have the manifest's SHA-256" in done.stderr and str(path) in done.stderr


@needs_headers
def test_what_the_device_saw_is_in_the_report(rtx: Bundle) -> None:
    """The engines are bytes that TensorRT-RTX does not take: both fail, in its words, with the device's identity."""
    done = on_host(rtx.folder, "--no-bench")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lm (tensorrt/typed/fp16): the engine is there" in done.stdout
    assert "nothing to build" in done.stdout and "not timed: asked for with --no-bench" in done.stdout
    report = read_report(rtx.folder)
    rows = [row for row in report.results if row.gate.startswith("export")]
    assert {row.component for row in rows} == {"lm", "audio_decoder"} and {row.status for row in rows} == {"failed"}
    for row in rows:
        assert "does not take the engine" in row.where and "on Orin, sm_89, TensorRT-RTX" in row.where
    assert report.environment is not None and report.environment["device"]["sm"] == "sm_89"
    assert report.latency == ()
