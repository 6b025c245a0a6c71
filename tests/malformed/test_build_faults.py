"""Faults of the host during a build: killed at any stage, full and read-only disks, two builders on one output.

The children are killed with SIGKILL at the stages that the build itself reports. They are forks of one process that
has the libraries loaded, because loading them takes longer than a small build.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters.build import Request, build, main
from exporters.errors import ExportError
from runtimes.bundle import BundleBusy, BundleError, load_bundle
from tests.exporters.plain import hidden, one_form, text_only
from tests.malformed.test_host_faults import PAGE, ROOT, resize, small_disk
from tests.refusals import raises

# One JSON request per line: {package, output, context, stage}. A fork builds and, at its first report of that stage,
# kills itself. Answers {"signal": number or 0, "error": what the build refused with, or ""}.
SERVER = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import exporters.stages
from exporters.build import Request, build
from tests.exporters.plain import one_form

def run(task):
    def progress(stage, size):
        # An export dies in the midst of its weights, any other stage where it begins.
        if stage == task["stage"] and (size or not stage.startswith("export")):
            os.kill(os.getpid(), signal.SIGKILL)
    package, output = Path(task["package"]), Path(task["output"])
    build(Request(one_form(), package, None, output, context=task["context"], bench=False), progress)

print("ready", flush=True)
for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(json.loads(line))
        except Exception as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        error = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "error": error}), flush=True)
"""

#: Every stage that a build of a quantised language model reports, in order.
STAGES = (
    "check packages", "lock", "build", "load", "capture lm", "export lm for onnx", "finish onnx",
    "read back lm onnx/fused/exact", "golden outputs of lm", "sync", "hash", "manifest", "parity",
    "rename", "renamed", "done",
)  # fmt: skip
#: From here on the new bundle is in its place.
PUBLISHED = STAGES.index("renamed")
#: Those that are tried in every run; the others when long tests are.
USUAL = ("export lm for onnx", "manifest", "renamed")
OLD, NEW, NEXT = 80, 96, 88


class Builders:
    """The process whose forks build."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def build(self, request: Request, stage: str | None = None) -> dict[str, Any]:
        """Runs ``request`` in a child that dies at ``stage``."""
        task = {"package": str(request.package), "output": str(request.output), "context": request.context}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(task | {"stage": stage}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def builders() -> Iterator[Builders]:
    started = Builders()
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    assert started.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def old(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A request whose bundle is there, with the smallest context; its package is an int4 checkpoint."""
    folder = tmp_path_factory.mktemp("old")
    package = text_only(tiny_student, folder / "student")
    request = Request(one_form(), package, None, folder / "bundle", context=OLD, bench=False)
    stages: list[str] = []
    build(request, lambda stage, size: stages.append(stage))
    assert tuple(dict.fromkeys(stages)) == STAGES
    return request


@pytest.fixture
def request_(old: Request, tmp_path: Path) -> Request:
    """The next build, over a copy of the old bundle."""
    output = tmp_path / "bundle"
    subprocess.run(["cp", "-a", old.output, output], check=True)
    return replace(old, output=output, context=NEW)


def context_of(output: Path) -> int:
    """The context of the bundle, which must be whole."""
    bundle = load_bundle(output)
    bundle.verify()
    return bundle.context


@pytest.mark.parametrize("stage", [s if s in USUAL else pytest.param(s, marks=pytest.mark.long) for s in STAGES])
def test_killed_at_a_stage_over_an_old_bundle(stage: str, builders: Builders, request_: Request) -> None:
    assert builders.build(request_, stage)["signal"] == signal.SIGKILL
    assert context_of(request_.output) == (NEW if STAGES.index(stage) >= PUBLISHED else OLD)
    bundle, _, reused = build(replace(request_, context=NEXT))
    assert not reused
    assert context_of(bundle.folder) == NEXT
    assert hidden(request_.output.parent) == []


@pytest.mark.parametrize("stage", [s if s == "parity" else pytest.param(s, marks=pytest.mark.long) for s in STAGES[1:]])
def test_killed_at_a_stage_with_no_bundle_before(stage: str, builders: Builders, old: Request, tmp_path: Path) -> None:
    request = replace(old, output=tmp_path / "bundle")
    assert builders.build(request, stage)["signal"] == signal.SIGKILL
    if STAGES.index(stage) >= PUBLISHED:
        assert context_of(request.output) == OLD
    else:
        with pytest.raises(BundleError, match="does not exist"):
            load_bundle(request.output)
    assert builders.build(request) == {"signal": 0, "error": ""}
    assert context_of(request.output) == OLD
    if STAGES.index(stage) < PUBLISHED:
        assert hidden(tmp_path) == []


def test_two_builders_on_one_output(builders: Builders, request_: Request) -> None:
    answers = []

    def second(stage: str, size: int) -> None:
        if stage == "export lm for onnx" and not answers:
            answers.append(builders.build(replace(request_, context=NEXT)))

    build(request_, second)
    [answer] = answers
    assert answer["error"].startswith(f"{BundleBusy.__name__}: ")
    assert f"process {os.getpid()} is building there" in answer["error"]
    assert context_of(request_.output) == NEW
    assert hidden(request_.output.parent) == []


@pytest.mark.long
def test_disk_full_wherever_it_ends(old: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk grows until the bundle fits; too small, the build is refused with one message and leaves nothing."""
    size = sum(file.size for file in load_bundle(old.output).files.values())
    failed_at = set()
    with small_disk(tmp_path / "disk", 1 << 22) as disk:
        request = replace(old, output=disk / "bundle")
        # Not even the first weights; the artifacts but not the golden file; all but the report.
        for pages in (2, size // PAGE // 2, size // PAGE):
            resize(disk, f"size={pages * PAGE}")
            stages: list[str] = []
            with raises(BundleError, match="No space left on device") as caught:
                build(request, lambda stage, size, seen=stages: seen.append(stage))
            assert "Free some space" in caught.value.way_out and caught.value.where.startswith(str(disk))
            assert list(disk.iterdir()) == []
            failed_at.add(stages[-1])
        assert len(failed_at) >= 2, failed_at
        resize(disk, f"size={2 * PAGE}")
        arguments = ["--profile", "host", "--package", str(old.package), "--output", str(disk / "bundle"), "--no-bench"]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "No space left on device" in said
        resize(disk, f"size={1 << 22}")
        build(request)
        assert context_of(request.output) == OLD


def test_a_full_disk_leaves_the_old_bundle(old: Request, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 22) as disk:
        request = replace(old, output=disk / "bundle")
        subprocess.run(["cp", "-a", old.output, request.output], check=True)
        resize(disk, f"size={sum(file.stat().st_size for file in disk.rglob('*') if file.is_file()) + 40 * PAGE}")
        with raises(BundleError, match="No space left on device"):
            build(replace(request, context=NEW))
        assert context_of(request.output) == OLD
        assert hidden(disk) == []


def test_a_read_only_output(old: Request, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 22) as disk:
        request = replace(old, output=disk / "bundle")
        subprocess.run(["cp", "-a", old.output, request.output], check=True)
        resize(disk, "ro")
        assert build(request)[2]  # what is there and unchanged can still be used
        stages: list[str] = []
        with raises(BundleError, match="Read-only file system"):
            build(replace(request, context=NEW), lambda stage, size: stages.append(stage))
        assert "load" not in stages, "nothing is spent on what cannot be written"
        assert context_of(request.output) == OLD
        resize(disk, "rw")


def test_a_package_that_vanishes_is_named(old: Request, tmp_path: Path) -> None:
    package = tmp_path / "student"
    subprocess.run(["cp", "-a", old.package, package], check=True)
    [shard, *_] = sorted(package.glob("*.safetensors"))

    def remove(stage: str, size: int) -> None:
        if stage == "golden outputs of lm":
            shard.unlink()

    request = replace(old, package=package, output=tmp_path / "bundle")
    with raises(ExportError) as caught:
        build(request, remove)
    assert shard.name in str(caught.value)
    assert not request.output.exists() and hidden(tmp_path) == []
