"""Engines, sidecars, keys and native files that are not sound: each is refused by name before native code reads it, and
a killed writer leaves the old engine, the new one, or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes import engines, machine_key
from runtimes.bundle import Artifact, Bundle, BundleError, load_bundle
from runtimes.engines import Machine, WrongEngine
from runtimes.machine_key import is_sealed, key_path, seal
from runtimes.session import open_session
from runtimes.tensorrt_options import options_of
from tests.refusals import raises
from tests.runtimes.engine_maker import tiny_engine_bundle

ROOT = Path(__file__).parents[2]
ORIN = Machine("TensorRT 10.3.0", "sm_87", "Orin", "ab" * 16, "12.6", "linux aarch64")
RTX = Machine("TensorRT-RTX 1.7.1.116", "sm_89", "NVIDIA GeForce RTX 4090", "cd" * 16, "13.0", "linux x86_64")
ENGINE = b"an engine's bytes" * 100


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_engine_bundle(tmp_path / "bundle")


@pytest.fixture
def rtx(tmp_path: Path) -> Bundle:
    return tiny_engine_bundle(tmp_path / "rtx", rtx=True)


def lm(bundle: Bundle) -> Artifact:
    return bundle.artifact("lm")


def refused(act: Callable[[], object], kind: type[Exception] = WrongEngine) -> str:
    with raises(kind) as caught:
        act()
    return str(caught.value)


# Sidecars

SIDECARS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "no object": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "fields of other kinds": lambda path: path.write_text('{"built": 3, "seal": []}'),
    "a list of lists": lambda path: path.write_text('{"built": [[1, 2, 3]], "seal": "x"}'),
    "no seal": lambda path: path.write_text('{"built": {}}'),
    "a key twice": lambda path: path.write_text('{"built": {}, "built": {}, "seal": ""}'),
    "not a number": lambda path: path.write_text('{"built": {"size": NaN}, "seal": ""}'),
    "deep": lambda path: path.write_text('{"built": ' + '{"a": ' * 9000 + "1" + "}" * 9000 + ', "seal": ""}'),
    "lone surrogates": lambda path: path.write_text('{"built": {"gpu": "\\ud800"}, "seal": "\\udfff"}'),
    "a terabyte": lambda path: os.truncate(path, 1 << 40),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "a link to the right one": lambda path: path.symlink_to(path.rename(path.with_suffix(".other"))),
}


@pytest.mark.parametrize("fault", SIDECARS)
def test_sidecars_that_are_none(bundle: Bundle, fault: str) -> None:
    engines.store(bundle, lm(bundle), ENGINE, ORIN)
    sidecar = engines.sidecar_path(bundle, lm(bundle))
    SIDECARS[fault](sidecar)
    said = refused(lambda: engines.read(bundle, lm(bundle), ORIN))
    assert str(sidecar) in said and "runtimes.finalize" in said
    assert "sidecar" in said or "sealed" in said
    assert engines.held(bundle, lm(bundle))  # a session then asks for an engine, and takes no stand-in


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_sidecar_never_passes(bundle: Bundle, data: st.DataObject) -> None:
    """One byte of it replaced, inserted or removed: refused, or the text says the same."""
    engines.store(bundle, lm(bundle), ENGINE, ORIN)
    sidecar = engines.sidecar_path(bundle, lm(bundle))
    text = sidecar.read_bytes()
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.binary(max_size=1))
    changed = text[:at] + new + text[at + data.draw(st.integers(0, 1)) :]
    sidecar.write_bytes(changed)
    try:
        engines.check(bundle, lm(bundle), ORIN)
    except WrongEngine:
        return
    assert json.loads(changed) == json.loads(text)


def test_a_sidecar_of_another_artifact(bundle: Bundle) -> None:
    """A real engine of this machine under another's name: every field but the source fits."""
    audio = bundle.artifact("audio_decoder")
    engines.store(bundle, audio, ENGINE, ORIN)
    for path in (engines.engine_path, engines.sidecar_path):
        os.rename(path(bundle, audio), path(bundle, lm(bundle)))
    assert "another version of the bundle" in refused(lambda: engines.read(bundle, lm(bundle), ORIN))


def test_a_sidecar_of_another_schema(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SCHEMA", 2)
    engines.store(bundle, lm(bundle), ENGINE, ORIN)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(bundle.folder.parent / "state"))
    assert "has schema 2, this version writes 1" in refused(lambda: engines.read(bundle, lm(bundle), ORIN))


def test_other_shape_ranges_are_another_engine(bundle: Bundle) -> None:
    engines.store(bundle, lm(bundle), ENGINE, ORIN)
    longer = {"decode": {"ids": [[1, 1]] * 3}, "prefill": {"ids": [[1, 1], [1, 3], [1, 9]]}}
    changed = replace(lm(bundle), options={**lm(bundle).options, "ranges": longer})
    assert "another version of the bundle" in refused(lambda: engines.check(bundle, changed, ORIN))


# Engines

ENGINES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda path: path.write_bytes(bytes([ENGINE[0] ^ 1]) + ENGINE[1:]),
    "one byte more": lambda path: path.write_bytes(ENGINE + b"\0"),
    "one byte less": lambda path: path.write_bytes(ENGINE[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: path.symlink_to(path.rename(path.with_suffix(".other"))),
}


@pytest.mark.parametrize("fault", ENGINES)
@pytest.mark.parametrize("how", [engines.read, engines.check])
def test_engines_that_changed(bundle: Bundle, fault: str, how: Callable[..., object]) -> None:
    path = engines.store(bundle, lm(bundle), ENGINE, ORIN)
    assert engines.read(bundle, lm(bundle), ORIN) == ENGINE
    ENGINES[fault](path)
    assert str(path) in refused(lambda: how(bundle, lm(bundle), ORIN))


# Engines that travel in the bundle


def test_an_engine_of_the_bundle_is_read_by_its_hash(rtx: Bundle) -> None:
    path = rtx.file(lm(rtx).options["engine"])
    assert engines.read(rtx, lm(rtx), RTX) == path.read_bytes()
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)
    said = refused(lambda: engines.read(rtx, lm(rtx), RTX))
    assert "does not have the SHA-256" in said and str(path) in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sm": "sm_120"}, "was built for sm sm_89, this machine has sm_120"),
        ({"compiler": "TensorRT-RTX 1.8.0.1"}, "compiler TensorRT-RTX 1.7.1.116, this machine has TensorRT-RTX 1.8"),
        ({"compiler": "TensorRT 10.3.0"}, "for compiler TensorRT-RTX 1.7.1.116, this machine has TensorRT 10.3.0"),
    ],
)  # fmt: skip
def test_an_engine_of_the_bundle_for_another_device(rtx: Bundle, change: dict[str, str], words: str) -> None:
    said = refused(lambda: engines.read(rtx, lm(rtx), replace(RTX, **change)))
    assert words in said and "Build a bundle" in said


@pytest.mark.parametrize("name", ["report.json", "../outside", "golden/lm.safetensors", "engines/timing.cache"])
def test_an_engine_that_no_hash_covers(rtx: Bundle, name: str) -> None:
    changed = replace(lm(rtx), options={**lm(rtx).options, "engine": name})
    assert "is not one of the artifact's files" in refused(lambda: engines.read(rtx, changed, RTX))


def test_an_engine_of_nobody_knows_what(rtx: Bundle) -> None:
    options = {key: value for key, value in lm(rtx).options.items() if key != "compiled"}
    said = refused(lambda: engines.read(rtx, replace(lm(rtx), options=options), RTX))
    assert "for compiler an unknown compiler" in said


# Options

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"generation": None}, "options.generation"),
    ({"sm": 87}, "options.sm"),
    ({"plugins": "EdgeLinear"}, "options.plugins"),
    ({"plugins": [1]}, "options.plugins"),
    ({"states": "copied"}, "options.states"),
    ({"ranges": {}}, "options.ranges"),
    ({"ranges": []}, "options.ranges"),
    ({"ranges": {"any": []}}, "options.ranges.any"),
    ({"ranges": {"any": {"codes": [[1], [2], [3]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, 1], [1, 2]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, 1], [1, 2], 3]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, 3], [1, 2], [1, 4]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, 0], [1, 2], [1, 4]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, 1], [1, 2], [1, 1 << 40]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1, True], [1, 2], [1, 4]]}}}, "options.ranges.any.ids"),
    ({"ranges": {"any": {"ids": [[1], [1, 2], [1, 4]]}}}, "options.ranges.any.ids"),
    ({"head": []}, "options.head"),
    ({"head": {"rows": "rows", "values": "v", "ids": "i", "k": 0}}, "options.head.k"),
    ({"head": {"rows": "rows", "values": "v", "k": 2}}, "options.head.ids"),
    ({"engine": 1}, "options.engine"),
]


@pytest.mark.parametrize(("change", "field"), OPTIONS)
def test_options_that_are_wrong(bundle: Bundle, change: dict[str, Any], field: str) -> None:
    options = {key: value for key, value in {**lm(bundle).options, **change}.items() if value is not None}
    said = refused(lambda: options_of(replace(lm(bundle), options=options)), BundleError)
    assert field in said and "lm (tensorrt/typed/fp16)" in said


# The key


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_key_that_others_can_reach_vouches_for_nothing(bundle: Bundle, mode: int) -> None:
    engines.store(bundle, lm(bundle), ENGINE, ORIN)
    key_path().chmod(mode)
    assert "not sealed by this machine" in refused(lambda: engines.read(bundle, lm(bundle), ORIN))
    engines.store(bundle, lm(bundle), ENGINE, ORIN)  # makes another key
    assert engines.read(bundle, lm(bundle), ORIN) == ENGINE
    assert key_path().stat().st_mode & 0o777 == 0o600


BROKEN_KEYS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(bytes(31)),
    "long": lambda path: path.write_bytes(bytes(33)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "a link": lambda path: path.symlink_to(path.rename(path.with_name("other"))),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("fault", BROKEN_KEYS)
def test_a_broken_key_is_replaced(fault: str) -> None:
    code = seal(b"text")
    assert is_sealed(b"text", code) and not is_sealed(b"Text", code)
    BROKEN_KEYS[fault](key_path())
    assert not is_sealed(b"text", code)
    assert is_sealed(b"text", seal(b"text"))
    assert sorted(p.name for p in key_path().parent.iterdir()) in (["engine.key"], ["engine.key", "other"])


def test_checking_makes_no_key(bundle: Bundle, state: Path) -> None:
    assert not is_sealed(b"text", "0" * 64)
    refused(lambda: engines.read(bundle, lm(bundle), ORIN))
    assert not state.exists()


def test_a_key_that_another_process_made_in_between_stays() -> None:
    code = seal(b"text")
    machine_key._make()  # as one does that has looked before there was a key
    assert is_sealed(b"text", code)


def test_two_processes_make_one_key(state: Path) -> None:
    script = "from runtimes.machine_key import seal; print(seal(b'text'))"
    made = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({child.communicate(timeout=60)[0] for child in made}) == 1


# Native files that the manifest does not hash


@pytest.mark.parametrize("name", [engines.PLUGINS, engines.TIMING_CACHE])
def test_native_files_from_elsewhere_are_removed(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    path.parent.mkdir()
    path.write_bytes(b"from elsewhere")
    assert engines.discard_foreign(bundle) == [name] and not path.exists()


@pytest.mark.parametrize("name", [engines.PLUGINS, engines.TIMING_CACHE])
def test_native_files_of_this_machine_stay_until_they_change(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    path.parent.mkdir()
    path.write_bytes(b"made here")
    engines.store(bundle, lm(bundle), ENGINE, ORIN, "library" if name == engines.PLUGINS else "none")
    assert engines.discard_foreign(bundle) == [] and path.read_bytes() == b"made here"
    path.write_bytes(b"made hera")
    assert engines.discard_foreign(bundle) == [name]


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_native_files_that_are_no_files(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    path, outside = bundle.folder / engines.PLUGINS, tmp_path / "outside.so"
    path.parent.mkdir()
    outside.write_bytes(b"x")
    path.symlink_to(outside) if kind == "a link" else os.mkfifo(path)
    assert engines.discard_foreign(bundle) == [engines.PLUGINS]
    assert outside.read_bytes() == b"x" and not os.path.lexists(path)


def test_a_linked_folder_of_engines_is_not_swept(bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".precious.new").write_bytes(b"x")
    (bundle.folder / engines.FOLDER).symlink_to(outside)
    engines.sweep(bundle.folder)
    assert (outside / ".precious.new").exists()


# A killed writer

# argv: the bundle, the number of the file operation to be killed before
KILLED_WRITER = """
import os, signal, sys
from runtimes import engines
from runtimes.bundle import load_bundle
from tests.malformed.test_engine_inputs import ENGINE, ORIN, lm

left = int(sys.argv[2])

def counted(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)

bundle = load_bundle(sys.argv[1])
for name in ("fsync", "replace", "unlink", "open", "link"):
    counted(name)
engines.store(bundle, lm(bundle), b"new" + ENGINE, ORIN)
"""


@pytest.mark.parametrize("before", [True, False], ids=["over an old engine", "anew"])
def test_killed_at_every_file_operation(tmp_path: Path, before: bool) -> None:
    outcomes = set()
    for number in range(1, 100):
        bundle = tiny_engine_bundle(tmp_path / str(number))
        if before:
            engines.store(bundle, lm(bundle), ENGINE, ORIN)
        command = [sys.executable, "-c", KILLED_WRITER, str(bundle.folder), str(number)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        try:
            outcomes.add(engines.read(bundle, lm(bundle), ORIN)[:3])
        except WrongEngine as error:
            outcomes.add(error.what[:10])
        engines.sweep(bundle.folder)
        load_bundle(bundle.folder).verify()  # nothing is left that a bundle may not have
        engines.store(bundle, lm(bundle), ENGINE, ORIN)
        assert engines.read(bundle, lm(bundle), ORIN) == ENGINE
    assert done.returncode == 0 and number > 5
    assert outcomes == {"has no sid", b"new"} | ({ENGINE[:3]} if before else set())


def test_a_session_over_a_foreign_engine_is_refused_or_waits_for_its_device(bundle: Bundle) -> None:
    """There is no GPU here to get as far as the sidecar; the file must not stand in for an engine that is there."""
    path = engines.engine_path(bundle, lm(bundle))
    path.parent.mkdir()
    path.write_bytes(b"from elsewhere")
    with pytest.raises(Exception, match=r"libcuda|cannot be loaded|has no sidecar"):
        open_session(bundle, lm(bundle))
