"""Whatever is put into a manifest, an archive or a profile: a sound value or the typed error, nothing else."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_profiles import Profile, ProfileError, load_profile_file
from device_profiles.loader import FOLDER
from runtimes.archive import pack, unpack
from runtimes.bundle import BundleError
from runtimes.manifest import Manifest
from runtimes.manifest_json import parse_manifest
from runtimes.strict_json import load_json
from tests.bundle_maker import FILES, make_bundle, manifest

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["../x", "lm", "exact", 1672, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def complete() -> dict[str, Any]:
    files = {path: {"size": len(data), "sha256": "0" * 64} for path, data in FILES.items()}
    return manifest() | {"schema": 1, "files": files}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(*at, key), *places(value[key], (*at, key))]]


@SETTINGS
@given(place=st.sampled_from(places(complete())), value=VALUES)
def test_any_value_anywhere_in_a_manifest(place: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(complete())
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        assert isinstance(parse_manifest(changed), Manifest)
    except BundleError as error:
        assert error.what and error.where and error.way_out


@SETTINGS
@given(data=st.binary(max_size=64) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_json(data: bytes) -> None:
    try:
        assert isinstance(load_json(data, "manifest.json"), dict)
    except BundleError as error:
        assert error.where == "manifest.json"


@SETTINGS
@given(position=st.integers(0, 30_000), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 30_000))
def test_any_byte_of_an_archive(tmp_path: Path, position: int, byte: int, cut: int | None) -> None:
    good = tmp_path / "good.tar"
    if not good.exists():
        pack(make_bundle(tmp_path / "bundle").folder, good)
    data = bytearray(good.read_bytes())
    data[position % len(data)] = byte
    (tmp_path / "bad.tar").write_bytes(data[: cut or len(data)])
    try:
        unpack(tmp_path / "bad.tar", tmp_path / "out").verify()
    except BundleError as error:
        assert error.what and error.way_out
    assert {entry.name for entry in tmp_path.iterdir()} <= {"good.tar", "bad.tar", "bundle", "out"}


KEYS = sorted(tomllib.loads((FOLDER / "jetson-orin.toml").read_text()))


@SETTINGS
@given(key=st.sampled_from(KEYS), value=SCALARS | st.lists(st.text(max_size=5), max_size=2))
def test_any_value_of_a_profile(tmp_path: Path, key: str, value: Any) -> None:
    lines = (FOLDER / "jetson-orin.toml").read_text().replace("\n    ", " ").splitlines()
    line = f"{key} = {json.dumps(value)}"
    changed = [line if text.startswith(f"{key} = ") else text for text in lines]
    path = tmp_path / "jetson-orin.toml"
    path.write_text("\n".join(changed))
    try:
        assert isinstance(load_profile_file(path), Profile)
    except ProfileError as error:
        assert "jetson-orin.toml" in error.where and error.what and error.way_out


def test_the_unchanged_values_are_sound(tmp_path: Path) -> None:
    parse_manifest(complete())
    with pytest.raises(BundleError):
        parse_manifest({})
