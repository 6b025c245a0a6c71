"""Bundles and archives that are not sound: each ends in a BundleError that says what, where and the way out."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes.archive import pack, unpack
from runtimes.bundle import Bundle, BundleError, UnsafeBundlePath, load_bundle, write_manifest
from runtimes.report import Report, write_report
from tests.bundle_maker import FILES, edit_manifest, make_bundle, manifest, write_files
from tests.refusals import raises


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def refused(act: Callable[[], object], kind: type[BundleError] = BundleError) -> str:
    with raises(kind) as caught:
        act()
    assert caught.value.what and caught.value.way_out
    return str(caught.value)


# Files on disk against the manifest


def test_a_file_that_is_not_in_the_manifest(bundle: Bundle) -> None:
    (bundle.folder / "onnx" / "extra.bin").write_bytes(b"x")
    assert "extra.bin: is not in the manifest" in refused(bundle.verify)


def test_what_a_killed_command_left_of_a_report(bundle: Bundle) -> None:
    """It is no reason to refuse the bundle, and the next report takes its place."""
    left = bundle.folder / ".report.json.new"
    left.write_bytes(b'{"half')
    bundle.verify()
    write_report(bundle.folder, Report())
    assert not left.exists()


def test_a_missing_file(bundle: Bundle) -> None:
    (bundle.folder / "onnx" / "lm.data").unlink()
    assert "lm.data: is missing" in refused(bundle.verify)


def test_a_file_of_another_size(bundle: Bundle) -> None:
    with open(bundle.folder / "onnx" / "lm.data", "ab") as file:
        file.write(b"x")
    assert "bytes instead of" in refused(bundle.verify)


def test_one_changed_bit(bundle: Bundle) -> None:
    data = bytearray(FILES["onnx/lm.data"])
    data[1000] ^= 1
    (bundle.folder / "onnx" / "lm.data").write_bytes(data)
    assert "does not have the manifest's SHA-256" in refused(bundle.verify)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "lm.exact.onnx"])
def test_a_link_in_the_bundle(bundle: Bundle, target: str) -> None:
    path = bundle.folder / "onnx" / "lm.data"
    path.unlink()
    path.symlink_to(target)
    assert "is a link" in refused(bundle.verify, UnsafeBundlePath)


def test_a_linked_folder_in_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    os.rename(bundle.folder / "onnx", tmp_path / "onnx")
    (bundle.folder / "onnx").symlink_to(tmp_path / "onnx")
    assert "is a link" in refused(bundle.verify, UnsafeBundlePath)


def test_a_fifo_in_the_bundle_is_not_waited_for(bundle: Bundle) -> None:
    (bundle.folder / "onnx" / "lm.data").unlink()
    os.mkfifo(bundle.folder / "onnx" / "lm.data")
    assert "is not a plain file" in refused(bundle.verify, UnsafeBundlePath)


def test_a_manifest_that_is_a_link_or_a_fifo(bundle: Bundle, tmp_path: Path) -> None:
    os.rename(bundle.folder / "manifest.json", tmp_path / "elsewhere.json")
    (bundle.folder / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    assert "is a link" in refused(lambda: load_bundle(bundle.folder), UnsafeBundlePath)
    (bundle.folder / "manifest.json").unlink()
    os.mkfifo(bundle.folder / "manifest.json")
    assert "is not a plain file" in refused(lambda: load_bundle(bundle.folder), UnsafeBundlePath)


def test_a_builder_that_leaves_a_link(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert "is a link" in refused(lambda: write_manifest(tmp_path, manifest()), UnsafeBundlePath)


# The manifest itself


def test_folders_that_are_not_bundles(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: load_bundle(tmp_path / "nowhere"))
    assert "has no manifest.json" in refused(lambda: load_bundle(tmp_path))
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(lambda: load_bundle(tmp_path / "file"))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
        b'{"schema": 1e999}',
        b'{"schema": -Infinity}',
        b'{"schema": ' + b"9" * 5000 + b"}",
        b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    ],
)
def test_manifests_that_are_not_json(bundle: Bundle, text: bytes) -> None:
    (bundle.folder / "manifest.json").write_bytes(text)
    assert "manifest.json" in refused(lambda: load_bundle(bundle.folder))


def test_a_huge_manifest_is_not_read(bundle: Bundle) -> None:
    with open(bundle.folder / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would take a terabyte
    assert "is larger than" in refused(lambda: load_bundle(bundle.folder))


def test_an_unknown_schema_version(bundle: Bundle) -> None:
    edit_manifest(bundle.folder, schema=2)
    said = refused(lambda: load_bundle(bundle.folder))
    assert "version 2" in said and "Update this runtime" in said
    edit_manifest(bundle.folder, schema=0)
    assert "Make the bundle again" in refused(lambda: load_bundle(bundle.folder))


@pytest.mark.parametrize("license_text", [None, "", "  ", 5])
def test_a_missing_licence(bundle: Bundle, license_text: object) -> None:
    student = {"name": "tiny", "version": "1.0.0", "sha256": "1" * 64, "license": license_text}
    edit_manifest(bundle.folder, student=student)
    assert "the licence is missing" in refused(lambda: load_bundle(bundle.folder))
    edit_manifest(bundle.folder, student=student | {"license": "MIT"}, licenses=[])
    assert "no licence is listed" in refused(lambda: load_bundle(bundle.folder))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", "a\\b", "C:/x", "a\0b", ".."])
@pytest.mark.parametrize("where", ["files", "mutable"])
def test_paths_that_leave_the_bundle(bundle: Bundle, path: str, where: str) -> None:
    value: Any = [path] if where == "mutable" else {path: {"size": 1, "sha256": "0" * 64}}
    edit_manifest(bundle.folder, **{where: value})
    assert "is not a plain path inside the bundle" in refused(lambda: load_bundle(bundle.folder), UnsafeBundlePath)


def changed_artifact(**changes: Any) -> dict[str, Any]:
    return {"artifacts": [manifest()["artifacts"][0] | changes]}


def changed_audio(**changes: Any) -> dict[str, Any]:
    modalities = manifest()["modalities"]
    return {"modalities": modalities | {"audio": modalities["audio"] | changes}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": "1672"}, "vocab_size"),
        ({"context": -1}, "context"),
        ({"special": {"bos": 1672, "eos": [], "pad": None}}, "outside the vocabulary"),
        ({"special": {"bos": 1, "eos": [-1], "pad": None}}, "special.eos[0]"),
        ({"special": {"bos": 1, "eos": 385, "pad": None}}, "special.eos"),
        ({"special": {"bos": 1, "eos": []}}, "special.pad"),
        ({"tokenizer": "tokenizer.json"}, "is not among the bundle's files"),
        ({"golden": {"lm": "golden/other"}}, "golden.lm"),
        ({"build_key": ""}, "build_key"),
        ({"files": {"A": {"size": 0, "sha256": "0" * 64}, "a": {"size": 0, "sha256": "0" * 64}}}, "only in case"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "size"),
        ({"files": {"a": {"size": 0, "sha256": "xyz"}}}, "sha256"),
        ({"student": {"name": "x", "version": "one", "license": "MIT", "sha256": "1" * 64}}, "semantic version"),
        (changed_artifact(component="video_decoder"), "component"),
        (changed_artifact(mode="quick"), "mode"),
        (changed_artifact(preferred=False), "exactly one preferred"),
        (changed_artifact(preferred="yes"), "preferred"),
        (changed_artifact(model="golden/lm.safetensors"), "not among the artifact's files"),
        (changed_artifact(files=["onnx/lm.exact.onnx", "../../lm.data"]), "is not a plain path"),
        (changed_artifact(inputs=[{"name": "ids", "dtype": "int33", "shape": []}]), "int33"),
        (changed_artifact(inputs=[{"name": "ids", "dtype": "int32", "shape": [-1]}]), "shape[0]"),
        (
            changed_artifact(states=[{"name": "k", "dtype": "int8", "shape": ["S"], "input": "a", "output": "b"}]),
            "fixed",
        ),
        (changed_audio(tokens=[300, 1324]), "overlap"),
        (changed_audio(tokens=[1000, 2024]), "inside the vocabulary"),
        (changed_audio(tokens=[648, 1671]), "do not fit"),
        (changed_audio(grid=[20, 5]), "do not fit"),
        (changed_audio(grid=[0, 4]), "do not fit"),
        (changed_audio(codebook_size=0), "codebook_size"),
        (changed_audio(begin=5000), "outside the vocabulary"),
        (
            {"tolerances": [{"component": "lm", "gate": "export", "metric": "kl", "limit": "small", "source": "x"}]},
            "limit",
        ),
    ],
)
def test_fields_that_are_wrong(bundle: Bundle, changes: dict[str, Any], said: str) -> None:
    edit_manifest(bundle.folder, **changes)
    assert said in refused(lambda: load_bundle(bundle.folder))


@pytest.mark.parametrize("key", sorted(manifest().keys() - {"created"}))
def test_fields_that_are_missing(bundle: Bundle, key: str) -> None:
    path = bundle.folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields[key]
    path.write_text(json.dumps(fields))
    assert key in refused(lambda: load_bundle(bundle.folder))


def test_a_builder_cannot_write_what_a_reader_refuses(tmp_path: Path) -> None:
    write_files(tmp_path)
    refused(lambda: write_manifest(tmp_path, manifest(vocab_size=-1)))
    assert not (tmp_path / "manifest.json").exists()


# Archives


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def spoilt(bundle: Bundle, tmp_path: Path, member: bytes) -> Path:
    """The bundle's archive with `member` put right after the manifest."""
    pack(bundle.folder, tmp_path / "good.tar")
    data = (tmp_path / "good.tar").read_bytes()
    size = (bundle.folder / "manifest.json").stat().st_size
    end = 512 + size + -size % 512
    path = tmp_path / "bad.tar"
    path.write_bytes(data[:end] + member + data[end:])
    return path


@pytest.mark.parametrize(
    "member",
    [
        header("../escape"),
        header("/tmp/escape"),
        header("onnx/../../escape"),
        header("onnx/link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        header("onnx/lm.data", kind=tarfile.LNKTYPE, link="../../secret"),
        header("onnx/device", kind=tarfile.CHRTYPE),
        header("onnx/disk", kind=tarfile.BLKTYPE),
        header("onnx/pipe", kind=tarfile.FIFOTYPE),
        header("onnx/holes", kind=tarfile.GNUTYPE_SPARSE),
        header("onnx", kind=tarfile.DIRTYPE),
        header("x", kind=tarfile.XHDTYPE),
        header("x", kind=tarfile.GNUTYPE_LONGNAME),
    ],
)
def test_members_that_are_refused(bundle: Bundle, tmp_path: Path, member: bytes) -> None:
    bad = spoilt(bundle, tmp_path, member)
    before = sorted(tmp_path.iterdir())
    refused(lambda: unpack(bad, tmp_path / "out"), UnsafeBundlePath)
    assert sorted(tmp_path.iterdir()) == before


def test_members_that_the_manifest_does_not_name(bundle: Bundle, tmp_path: Path) -> None:
    assert "not in the manifest" in refused(lambda: unpack(spoilt(bundle, tmp_path, header("extra")), tmp_path / "out"))
    twice = header("onnx/lm.exact.onnx", 5) + b"graph".ljust(512, b"\0")
    assert "twice" in refused(lambda: unpack(spoilt(bundle, tmp_path, twice), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_archives_that_are_damaged(bundle: Bundle, tmp_path: Path) -> None:
    pack(bundle.folder, tmp_path / "good.tar")
    data = (tmp_path / "good.tar").read_bytes()
    bad = tmp_path / "bad.tar"
    for length in range(0, len(data) - 1024, 512):
        bad.write_bytes(data[:length])
        refused(lambda: unpack(bad, tmp_path / "out"))
    where = data.index(FILES["onnx/lm.data"])
    bad.write_bytes(data[:where] + b"\xff" + data[where + 1 :])
    assert "SHA-256" in refused(lambda: unpack(bad, tmp_path / "out"))
    bad.write_bytes(data[:10] + b"X" + data[11:])
    assert "is not a plain tar archive" in refused(lambda: unpack(bad, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "bundle", "good.tar"]


def test_a_decompression_bomb_is_not_decompressed(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=9) as file:
        file.write(header("manifest.json", 1 << 30))
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert "compressed ones are not taken" in refused(lambda: unpack(bomb, tmp_path / "out"))


def test_an_archive_that_claims_more_than_it_has(tmp_path: Path) -> None:
    fields = manifest(artifacts=[], golden={}, files={"big": {"size": 1 << 50, "sha256": "0" * 64}})
    text = json.dumps(fields | {"schema": 1}).encode()
    path = tmp_path / "a.tar"
    path.write_bytes(header("manifest.json", len(text)) + text + bytes(-len(text) % 512) + header("big", 1 << 50))
    assert "more than the archive has" in refused(lambda: unpack(path, tmp_path / "out"))
    path.write_bytes(header("manifest.json", 1 << 50))
    assert "ends inside" in refused(lambda: unpack(path, tmp_path / "out"))


def test_archives_without_a_manifest_first(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("other")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert "does not begin with manifest.json" in refused(lambda: unpack(tmp_path / "a.tar", tmp_path / "out"))
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    refused(lambda: unpack(tmp_path / "empty.tar", tmp_path / "out"))
    os.mkfifo(tmp_path / "pipe.tar")
    refused(lambda: unpack(tmp_path / "pipe.tar", tmp_path / "out"), UnsafeBundlePath)


def test_an_older_version_in_an_archive(bundle: Bundle, tmp_path: Path) -> None:
    pack(bundle.folder, tmp_path / "a.tar")
    make_bundle(tmp_path / "out", "2.0.0")
    assert "newer than 1.0.0" in refused(lambda: unpack(tmp_path / "a.tar", tmp_path / "out"))
    assert load_bundle(tmp_path / "out").student.version == "2.0.0"
    assert unpack(tmp_path / "a.tar", tmp_path / "out", allow_downgrade=True).student.version == "1.0.0"


def test_a_command_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not an archive" * 100)
    command = [sys.executable, "-m", "runtimes.archive", "unpack", str(tmp_path / "a.tar"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "a.tar" in done.stderr and "Traceback" not in done.stderr
