"""Engines and their sidecars: what this machine built is taken, everything else is refused with its reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtimes import engines
from runtimes.bundle import Artifact, Bundle, load_bundle
from runtimes.engines import Machine, WrongEngine
from runtimes.files import write_durably
from runtimes.session import open_session
from tests.runtimes.bundle_edits import copy_bundle

HERE = Machine("TensorRT 10.3.0", "sm_87", "Orin", "ab" * 16, "12.6", "linux aarch64")
ENGINE = b"an engine's bytes" * 100


@pytest.fixture(scope="module")
def original(orin_bundle: Path) -> Bundle:
    return load_bundle(orin_bundle)


@pytest.fixture
def bundle(original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return load_bundle(copy_bundle(original.folder, tmp_path / "bundle"))


def typed(bundle: Bundle) -> Artifact:
    return bundle.artifact("lm", "tensorrt", "typed")


def test_what_was_stored_is_found(bundle: Bundle) -> None:
    assert not engines.held(bundle, typed(bundle))
    path = engines.store(bundle, typed(bundle), ENGINE, HERE)
    assert engines.check(bundle, typed(bundle), HERE) == path
    assert path.read_bytes() == ENGINE
    load_bundle(bundle.folder).verify()  # engines are files that a bundle may have


def test_the_key_is_its_owners_alone(bundle: Bundle) -> None:
    engines.store(bundle, typed(bundle), ENGINE, HERE)
    assert engines.key_path().stat().st_mode & 0o777 == 0o600
    assert len(engines.key_path().read_bytes()) == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compiler", "TensorRT 10.4.0"),
        ("sm", "sm_110"),
        ("gpu", "Thor"),
        ("uuid", "cd" * 16),
        ("cuda", "13.0"),
        ("system", "linux x86_64"),
    ],
)
def test_an_engine_of_another_machine_is_refused(bundle: Bundle, field: str, value: str) -> None:
    engines.store(bundle, typed(bundle), ENGINE, HERE)
    with pytest.raises(WrongEngine, match=rf"was built for {field} .*this machine has {value}"):
        engines.check(bundle, typed(bundle), replace(HERE, **{field: value}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "one bit of the engine": (lambda engine, sidecar: flip(engine), "does not have the SHA-256"),
    "no engine": (lambda engine, sidecar: engine.unlink(), "missing or not a plain file"),
    "a link for the engine": (
        lambda engine, sidecar: engine.symlink_to(engine.rename(engine.with_suffix(".other"))),
        "missing or not a plain file",
    ),
    "no sidecar": (lambda engine, sidecar: sidecar.unlink(), "has no sidecar"),
    "no JSON": (lambda engine, sidecar: sidecar.write_text("{"), "is not a sidecar"),
    "another shape": (lambda engine, sidecar: sidecar.write_text("[1]"), "is not a sidecar"),
    "another machine's name in the sidecar": (
        lambda engine, sidecar: edit(sidecar, lambda c: c["built"].update(sm="sm_110")), "not sealed by this machine",
    ),
    "another seal": (lambda engine, sidecar: edit(sidecar, lambda c: c.update(seal="0" * 64)), "not sealed by this"),
    "another machine's key": (lambda engine, sidecar: engines.key_path().write_bytes(os.urandom(32)), "not sealed by"),
    "no key": (lambda engine, sidecar: engines.key_path().unlink(), "not sealed by this machine"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tampered_engine_is_refused_before_it_is_read(bundle: Bundle, fault: str) -> None:
    spoil, reason = FAULTS[fault]
    path = engines.store(bundle, typed(bundle), ENGINE, HERE)
    spoil(path, engines.sidecar_path(bundle, typed(bundle)))
    with pytest.raises(WrongEngine, match=reason) as caught:
        engines.check(bundle, typed(bundle), HERE)
    assert "runtimes.finalize" in caught.value.way_out


def test_an_engine_of_another_bundle_is_refused(bundle: Bundle) -> None:
    engines.store(bundle, typed(bundle), ENGINE, HERE)
    model = typed(bundle).model
    changed = replace(bundle, files={**bundle.files, model: replace(bundle.files[model], sha256="0" * 64)})
    with pytest.raises(WrongEngine, match="another version of the bundle"):
        engines.check(changed, typed(changed), HERE)


def test_other_plugins_are_refused(bundle: Bundle) -> None:
    fused = bundle.artifact("lm", "tensorrt", "fused")
    library = bundle.folder / engines.PLUGINS
    library.parent.mkdir()
    library.write_bytes(b"plugins")
    engines.store(bundle, fused, ENGINE, HERE, "library")
    assert engines.packaging_of(bundle, fused) == "library"
    engines.check(bundle, fused, HERE)
    library.write_bytes(b"other plugins")
    with pytest.raises(WrongEngine, match="other plugins"):
        engines.check(bundle, fused, HERE)


@pytest.mark.parametrize("crash_at", [0, 1])
def test_a_crash_leaves_no_engine_that_is_taken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, crash_at: int) -> None:
    engines.store(bundle, typed(bundle), ENGINE, HERE)
    calls = iter(range(9))

    def failing(path: Path, data: bytes) -> None:
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        write_durably(path, data)

    monkeypatch.setattr(engines, "write_durably", failing)
    with pytest.raises(KeyboardInterrupt):
        engines.store(bundle, typed(bundle), ENGINE + b"!", HERE)
    with pytest.raises(WrongEngine, match="has no sidecar"):
        engines.check(bundle, typed(bundle), HERE)


def test_a_session_never_falls_back_from_a_wrong_engine(bundle: Bundle) -> None:
    """Without a GPU there is nothing to run it on, and it is not taken for absent either."""
    engines.store(bundle, typed(bundle), ENGINE, HERE)
    with pytest.raises(Exception, match=r"libcuda|WrongEngine|was built for"):
        open_session(bundle, typed(bundle))
