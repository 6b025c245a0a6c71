"""Faults of the host while a bundle is published: killed, full, read-only, busy. The old or the new, never a mix.

Nothing is simulated: children are killed with SIGKILL at the stages that the builder itself reports, disks are small
tmpfs mounts (or a file-size limit), and locks are held by other processes.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from runtimes.archive import pack, unpack
from runtimes.bundle import BundleBusy, BundleError, load_bundle, staged, write_manifest
from runtimes.files import storage_errors
from tests.bundle_maker import FILES, make_bundle, manifest
from tests.refusals import raises

ROOT = Path(__file__).parents[2]
PAGE = 4096

# argv: output, version, marker, exchange (0 or 1), the number of the report to be killed at
KILLED_BUILDER = """
import os, signal, sys
from pathlib import Path
from tests.bundle_maker import make_bundle

reports = 0

def progress(stage, size):
    global reports
    reports += 1
    if reports == int(sys.argv[5]):
        print(stage, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

make_bundle(Path(sys.argv[1]), sys.argv[2], sys.argv[3].encode(), exchange=sys.argv[4] == "1", progress=progress)
"""

# argv: output, exchange (0 or 1), the stage to wait at until standard input closes
WAITING_BUILDER = """
import sys
from pathlib import Path
from tests.bundle_maker import make_bundle

def progress(stage, size):
    if stage == sys.argv[3]:
        print("waiting", flush=True)
        sys.stdin.read()

make_bundle(Path(sys.argv[1]), "1.0.1", b"child", exchange=sys.argv[2] == "1", progress=progress)
"""

RESTLESS_BUILDER = """
import itertools, sys
from pathlib import Path
from tests.bundle_maker import make_bundle

for number in itertools.count():
    make_bundle(Path(sys.argv[1]), f"1.0.{number + 1}", str(number).encode(), exchange=sys.argv[2] == "1")
    if number == 0:
        print("started", flush=True)
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def check_whole(output: Path, markers: set[bytes]) -> bytes:
    """The bundle at `output` is sound, and all of it is of one of the markers."""
    bundle = load_bundle(output)
    bundle.verify()
    found = {bundle.file(path).read_bytes()[len(data) :] for path, data in FILES.items()}
    assert len(found) == 1
    (marker,) = found
    assert marker in markers
    return marker


def reports_of_a_build(output: Path, exchange: bool) -> list[str]:
    stages: list[str] = []
    make_bundle(output, exchange=exchange, progress=lambda stage, size: stages.append(stage))
    return stages


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["over an old bundle", "anew"])
def test_killed_at_every_stage(tmp_path: Path, exchange: bool, before: bool) -> None:
    count = len(reports_of_a_build(tmp_path / "probe", exchange))
    if before:
        count = len(reports_of_a_build(tmp_path / "probe", exchange))
    seen, results = [], []
    for number in range(1, count + 1):
        output = tmp_path / f"case{number}" / "out"
        output.parent.mkdir()
        if before:
            make_bundle(output, "1.0.0", b"old")
        builder = child(KILLED_BUILDER, output, "1.0.1", "new", int(exchange), number)
        stdout, stderr = builder.communicate(timeout=60)
        assert builder.returncode == -signal.SIGKILL, stderr
        seen.append(stdout.strip())
        if before:
            results.append(check_whole(output, {b"old", b"new"}))
        elif output.exists():
            results.append(check_whole(output, {b"new"}))
        else:
            with pytest.raises(BundleError, match="does not exist"):
                load_bundle(output)
        make_bundle(output, "1.0.2", b"next")
        check_whole(output, {b"next"})
        assert hidden(output.parent) == [], seen[-1]
    assert {"lock", "build", "sync", "hash", "manifest", "rename", "renamed", "done"} <= set(seen)
    assert ("aside" in seen) == (before and not exchange)
    assert b"new" in results
    assert (b"old" in results) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_moment(tmp_path: Path, exchange: bool) -> None:
    moments = random.Random(0)
    output = tmp_path / "out"
    for _ in range(8):
        builder = child(RESTLESS_BUILDER, output, int(exchange))
        assert builder.stdout is not None
        assert builder.stdout.readline() == "started\n"
        time.sleep(moments.uniform(0, 0.1))
        builder.kill()
        builder.communicate()
        bundle = load_bundle(output)
        check_whole(output, {bundle.file("onnx/lm.exact.onnx").read_bytes().removeprefix(b"graph")})
        make_bundle(output, "1.0.0", b"old", allow_downgrade=True)
        assert hidden(tmp_path) == []


def test_readers_always_find_a_bundle(tmp_path: Path) -> None:
    output = tmp_path / "out"
    builder = child(RESTLESS_BUILDER, output, 1)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "started\n"
    versions = set()
    try:
        end = time.monotonic() + 60
        while len(versions) < 20 and time.monotonic() < end:
            versions.add(load_bundle(output).student.version)
    finally:
        builder.kill()
        builder.communicate()
    assert len(versions) == 20


@pytest.mark.parametrize("stage", ["build", "sync", "rename", "renamed"])
def test_two_builders_on_one_output(tmp_path: Path, stage: str) -> None:
    make_bundle(tmp_path / "out", "1.0.0", b"old")
    builder = child(WAITING_BUILDER, tmp_path / "out", 1, stage)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "waiting\n"
    with raises(BundleBusy, match=f"process {builder.pid} is building there") as caught:
        make_bundle(tmp_path / "out", "1.0.2", b"mine")
    assert caught.value.way_out
    make_bundle(tmp_path / "other", "1.0.2", b"mine")  # another output is nobody else's business
    builder.communicate(timeout=60)
    assert builder.returncode == 0
    check_whole(tmp_path / "out", {b"child"})
    assert hidden(tmp_path) == []


def test_a_killed_builder_holds_no_lock(tmp_path: Path) -> None:
    builder = child(WAITING_BUILDER, tmp_path / "out", 1, "build")
    assert builder.stdout is not None
    builder.stdout.readline()
    builder.kill()
    builder.communicate()
    assert len(hidden(tmp_path)) == 2  # its lock and its temporary folder
    make_bundle(tmp_path / "out", marker=b"mine")
    assert hidden(tmp_path) == []


def test_a_reader_between_the_two_renames_is_told_who_builds(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out", "1.0.0", b"old")
    builder = child(WAITING_BUILDER, tmp_path / "out", 0, "aside")
    assert builder.stdout is not None
    assert builder.stdout.readline() == "waiting\n"
    with raises(BundleBusy, match=f"process {builder.pid}"):
        load_bundle(tmp_path / "out")
    builder.kill()
    builder.communicate()
    check_whole(tmp_path / "out", {b"old"})


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `folder`. Skips the test where mounting is not allowed."""
    folder.mkdir()
    options = f"size={size}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used(folder: Path) -> int:
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.parametrize("before", [True, False], ids=["over an old bundle", "anew"])
def test_disk_full_at_every_write(tmp_path: Path, before: bool) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        output = disk / "out"
        if before:
            make_bundle(output, "1.0.0", b"old")
        start = used(disk)
        for pages in range(1, 100):
            resize(disk, f"size={start + pages * PAGE}")
            try:
                make_bundle(output, "1.0.1", b"new")
                break
            except BundleError as error:
                assert "No space left on device" in error.what
                assert "Free some space" in error.way_out
                assert error.where.startswith(str(disk))
            assert hidden(disk) == []
            assert used(disk) == start
            if before:
                check_whole(output, {b"old"})
            else:
                assert not output.exists()
        assert pages > 3
        check_whole(output, {b"new"})


def test_disk_full_in_a_native_writer(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * PAGE) as disk:
        with raises(BundleError, match="No space left on device"), staged(disk / "out") as folder:
            save_file({"weights": np.zeros(1 << 20, np.float32)}, folder / "weights.safetensors")
        assert list(disk.iterdir()) == []


def test_disk_full_while_packing_and_unpacking(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    pack(bundle.folder, tmp_path / "good.tar")
    with small_disk(tmp_path / "disk", 4 * PAGE) as disk:
        with raises(BundleError, match="No space left on device"):
            pack(bundle.folder, disk / "a.tar")
        with raises(BundleError, match="are free"):
            unpack(tmp_path / "good.tar", disk / "out")
        assert list(disk.iterdir()) == []


def test_read_only_output(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        make_bundle(disk / "out", "1.0.0", b"old")
        resize(disk, "ro")
        with raises(BundleError, match=r"Read-only file system.*elsewhere"):
            make_bundle(disk / "out", "1.0.1", b"new")
        check_whole(disk / "out", {b"old"})
        with raises(BundleError, match="Read-only file system"):
            make_bundle(disk / "new" / "out")
        with raises(BundleError, match="Read-only file system"):
            pack(disk / "out", disk / "a.tar")
        resize(disk, "rw")


def test_an_output_that_is_a_mount_point(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk, raises(BundleError, match="is a mount point"):
        make_bundle(disk)


def test_a_place_where_nobody_may_write() -> None:
    with raises(BundleError) as caught:
        make_bundle(Path("/sys/kernel/out"))
    assert caught.value.where.startswith("/sys/kernel")
    assert caught.value.way_out


def test_file_size_limit(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out", "1.0.0", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, 2000, 10_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with raises(BundleError, match=r"File too large.*file-size limit"):
                make_bundle(tmp_path / "out", "1.0.1", b"new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert hidden(tmp_path) == []
        check_whole(tmp_path / "out", {b"old"})


def test_an_input_output_error_names_the_file() -> None:
    path = Path("/proc/self/mem")  # nothing is mapped at address 0, so reading it fails with EIO
    if not path.exists():
        pytest.skip("there is no /proc/self/mem to fail")
    said = r"Input/output error.*disk reports a fault"
    with raises(BundleError, match=said) as caught, storage_errors(path), open(path, "rb", buffering=0) as file:
        file.read(1)
    assert caught.value.where == "/proc/self/mem"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with raises(BundleError, match="shorter output path"):
        make_bundle(tmp_path / ("x" * 300))


def test_errors_that_are_not_the_disks_come_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out") as folder:
        (folder / "nowhere" / "file").read_bytes()
    with pytest.raises(RuntimeError, match="of another kind"), staged(tmp_path / "out"):
        raise RuntimeError("of another kind")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        write_manifest(folder, manifest(artifacts=[], golden={}))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
