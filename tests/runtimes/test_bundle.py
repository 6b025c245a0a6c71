"""Bundles: what a builder writes is what a reader gets, byte for byte, and publishing replaces whole folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.archive import pack, unpack
from runtimes.bundle import BundleError, comparable, load_bundle, publish, staged, write_manifest
from runtimes.manifest import parse_version
from tests.bundle_maker import FILES, make_bundle, manifest, write_files


def hidden(folder: Path) -> list[str]:
    """What publishing must not leave beside the output."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def test_a_published_bundle_reads_back(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    bundle.verify()
    assert bundle.student.version == "1.0.0"
    assert bundle.special.eos == (385,)
    assert bundle.modalities["audio"].length == 80
    assert bundle.artifact("lm").states[0].shape == (1, 2, 256, 32)
    assert bundle.artifact("lm", backend="onnx", mode="exact").label == "onnx/fused/exact"
    assert bundle.file("onnx/lm.data").read_bytes() == FILES["onnx/lm.data"]
    assert sorted(bundle.files) == sorted(FILES)
    assert hidden(tmp_path) == []


def test_an_artifact_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    with pytest.raises(BundleError, match=r"no mode=fast artifact for lm.*onnx/fused/exact"):
        bundle.artifact("lm", mode="fast")
    with pytest.raises(BundleError, match="no artifact of that component"):
        bundle.artifact("image_decoder")
    with pytest.raises(BundleError, match="not a file of this bundle"):
        bundle.file("../secret")


def test_two_builds_give_the_same_manifest_but_for_its_time(tmp_path: Path) -> None:
    texts = []
    for name, time in (("a", "2026-01-01T00:00:00Z"), ("b", "2026-02-02T00:00:00Z")):
        with staged(tmp_path / name) as folder:
            write_files(folder)
            shuffled = dict(reversed(list(manifest(created=time).items())))
            write_manifest(folder, shuffled)
        texts.append((tmp_path / name / "manifest.json").read_bytes())
    assert texts[0] != texts[1]
    assert comparable(json.loads(texts[0])) == comparable(json.loads(texts[1]))
    assert texts[0].replace(b"2026-01-01", b"2026-02-02") == texts[1]


def test_reports_may_change_after_the_manifest(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    bundle.file("report.json").write_text('[{"status": "passed"}]')
    bundle.file("report.md").write_text("new")
    bundle.verify()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_new_bundle_replaces_the_old_one_whole(tmp_path: Path, exchange: bool) -> None:
    make_bundle(tmp_path / "out", "1.0.0", marker=b"old", exchange=exchange)
    with staged(tmp_path / "out", exchange=exchange) as folder:
        (folder / "other.bin").write_bytes(b"other")
        write_manifest(folder, manifest("1.1.0", artifacts=[], golden={}))
    bundle = load_bundle(tmp_path / "out")
    bundle.verify()
    assert list(bundle.files) == ["other.bin"]
    assert hidden(tmp_path) == []


def test_an_error_while_building_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out", marker=b"old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as folder:
        write_files(folder, b"new")
        raise ZeroDivisionError
    bundle = load_bundle(tmp_path / "out")
    bundle.verify()
    assert bundle.file("onnx/lm.exact.onnx").read_bytes().endswith(b"old")
    assert hidden(tmp_path) == []


def test_a_builder_that_writes_no_manifest_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"wrote no manifest\.json"), staged(tmp_path / "out") as folder:
        write_files(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    make_bundle(tmp_path / "real", "1.0.0")
    (tmp_path / "link").symlink_to("real")
    make_bundle(tmp_path / "link", "1.0.1")
    assert (tmp_path / "link").is_symlink()
    assert load_bundle(tmp_path / "real").student.version == "1.0.1"


def test_something_else_at_the_output_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        make_bundle(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("text")
    with pytest.raises(BundleError, match="is not a bundle"):
        make_bundle(tmp_path / "file")
    assert hidden(tmp_path) == []


def test_an_empty_folder_is_a_fine_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make_bundle(tmp_path / "out").verify()


def test_an_older_version_needs_leave(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out", "1.10.0")
    with pytest.raises(BundleError, match=r"holds tiny 1\.10\.0, newer than 1\.9\.0.*--allow-downgrade"):
        make_bundle(tmp_path / "out", "1.9.0")
    assert load_bundle(tmp_path / "out").student.version == "1.10.0"
    make_bundle(tmp_path / "out", "1.9.0", allow_downgrade=True)
    assert load_bundle(tmp_path / "out").student.version == "1.9.0"


def test_another_student_is_not_a_downgrade(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out", "2.0.0")
    other = manifest("1.0.0")
    other["student"] = other["student"] | {"name": "other"}
    with staged(tmp_path / "out") as folder:
        write_files(folder)
        write_manifest(folder, other)
    assert load_bundle(tmp_path / "out").student.name == "other"


def test_versions_order_as_semantic_versions_do() -> None:
    # The chain of https://semver.org, number 11.
    texts = "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0 1.0.1"
    keys = [parse_version(text) for text in texts.split()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert parse_version("1.0.0+build.1") == parse_version("1.0.0")


def test_publishing_across_file_systems_copies(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system to publish from")
    source = elsewhere / f"bundle-{os.getpid()}"
    try:
        make_bundle(source)
        publish(source, tmp_path / "out").verify()
        assert (tmp_path / "out" / "report.json").read_text() == "[]"
        load_bundle(source).verify()
    finally:
        subprocess.run(["rm", "-rf", str(source)], check=True)


def test_a_damaged_bundle_is_not_published_further(tmp_path: Path) -> None:
    make_bundle(tmp_path / "source")
    (tmp_path / "source" / "onnx" / "lm.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"lm\.data"):
        publish(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_archives_are_whole_and_deterministic(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    pack(bundle.folder, tmp_path / "a.tar")
    os.utime(bundle.folder / "onnx" / "lm.data", (1, 1))
    pack(bundle.folder, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    taken = unpack(tmp_path / "a.tar", tmp_path / "taken")
    taken.verify()
    assert (tmp_path / "taken" / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
    assert (tmp_path / "taken" / "report.json").read_text() == "[]"
    assert hidden(tmp_path) == []


def test_archives_are_what_tar_reads(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    pack(bundle.folder, tmp_path / "a.tar")
    listed = subprocess.run(["tar", "-tf", str(tmp_path / "a.tar")], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["manifest.json", *sorted([*FILES, "report.json"])]


def test_the_archive_command(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out")
    command = [sys.executable, "-m", "runtimes.archive"]
    subprocess.run([*command, "pack", str(bundle.folder), str(tmp_path / "a.tar")], check=True)
    subprocess.run([*command, "unpack", str(tmp_path / "a.tar"), str(tmp_path / "taken")], check=True)
    load_bundle(tmp_path / "taken").verify()
    failed = subprocess.run([*command, "unpack", str(tmp_path), str(tmp_path / "no")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "is not a plain file" in failed.stderr
    assert "Traceback" not in failed.stderr
