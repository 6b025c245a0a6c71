"""Damaged .xml and .bin files: a typed error each, and never a traceback of the vendor's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from device_profiles import load_profile
from exporters.backends import Job
from exporters.families.decoder_lm import capture_lm
from exporters.openvino_ import OpenVinoExporter
from exporters.student import load_student
from runtimes.bundle import Artifact, Bundle, BundleError, FileInfo
from runtimes.errors import Fault
from runtimes.openvino_ import UnreadableModel
from runtimes.session import open_session
from runtimes.versions import WrongRuntime
from tests.bundle_maker import make_bundle
from tests.refusals import raises


@dataclass(frozen=True)
class Files:
    bundle: Bundle
    artifact: Artifact

    @property
    def xml(self) -> Path:
        return self.bundle.folder / self.artifact.files[0]

    @property
    def bin(self) -> Path:
        return self.bundle.folder / self.artifact.files[1]


@pytest.fixture(scope="module")
def pristine(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("openvino")
    program, exporter = capture_lm(load_student(tiny_student), 64), OpenVinoExporter()
    [artifact] = exporter.export(Job(program, load_profile("host"), folder, [("ir", "exact")]))
    return artifact, {file: (folder / file).read_bytes() for file in artifact.files}


@pytest.fixture
def files(pristine: tuple[Artifact, dict[str, bytes]], tmp_path: Path) -> Files:
    artifact, contents = pristine
    made = make_bundle(tmp_path / "bundle")
    for file, data in contents.items():
        (made.folder / file).parent.mkdir(exist_ok=True)
        (made.folder / file).write_bytes(data)
    infos = {**made.files, **{file: FileInfo(len(data), "") for file, data in contents.items()}}
    return Files(replace(made, files=infos, artifacts=(artifact,), vocab_size=136, context=64), artifact)


def cut(part: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * part)]


XML_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": cut(0.5),
    "not xml": lambda data: b"\x00\xff" * 500,
    "another document": lambda data: b"<?xml version='1.0'?><html/>",
    "unknown operator": lambda data: data.replace(b'type="MatMul"', b'type="MatNul"', 1),
    "unknown type": lambda data: data.replace(b'element_type="u4"', b'element_type="u5"', 1),
    "negative offset": lambda data: data.replace(b'offset="0"', b'offset="-64"', 1),
    "offset past the end": lambda data: data.replace(b'offset="0"', b'offset="99999999999"', 1),
    "size too large": lambda data: data.replace(b' size="', b' size="9999999', 1),
    "edge to nowhere": lambda data: data.replace(b'<edge from-layer="', b'<edge from-layer="99', 1),
    "no such input": lambda data: data.replace(b'"ids"', b'"idx"'),
    "entities": lambda data: (
        b'<!DOCTYPE n [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + data.replace(b'"ids"', b'"&a;"')
    ),
}


def test_the_pristine_files_load(files: Files) -> None:
    with open_session(files.bundle, files.artifact, 1) as session:
        assert session.capacity == 64


@pytest.mark.parametrize("damage", XML_DAMAGE.values(), ids=XML_DAMAGE)
def test_a_damaged_graph(files: Files, damage: Callable[[bytes], bytes]) -> None:
    before = files.xml.read_bytes()
    files.xml.write_bytes(damage(before))
    assert files.xml.read_bytes() != before
    with raises(UnreadableModel, match=r"lm \(openvino/ir/exact\)|lm \(openvino ir exact\)"):
        open_session(files.bundle, files.artifact, 1)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_weights_that_are_too_short(files: Files, part: float) -> None:
    files.bin.write_bytes(cut(part)(files.bin.read_bytes()))
    with raises(UnreadableModel):
        open_session(files.bundle, files.artifact, 1)


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_file(files: Files, index: int) -> None:
    (files.bundle.folder / files.artifact.files[index]).unlink()
    with raises(UnreadableModel):
        open_session(files.bundle, files.artifact, 1)


def test_a_file_that_the_manifest_does_not_list(files: Files) -> None:
    listed = {path: info for path, info in files.bundle.files.items() if not path.endswith(".bin")}
    with raises(BundleError, match=r"lm\.ir\.bin"):
        open_session(replace(files.bundle, files=listed), files.artifact, 1)


def test_another_release_of_openvino_is_refused_with_both_versions(files: Files) -> None:
    other = replace(files.artifact, runtime={"openvino": "2019.1"})
    with raises(WrongRuntime, match=r"needs openvino 2019\.1, installed is 20"):
        open_session(files.bundle, other)


def test_a_device_string_that_means_nothing(files: Files) -> None:
    for device in ("", ":", "CPU:", "TOASTER", "AUTO:", "\x00", "CPU.99"):
        odd = replace(files.artifact, options={"device": device})
        with raises(Fault):
            open_session(files.bundle, odd)
