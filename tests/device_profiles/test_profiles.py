"""Every shipped profile is whole and sourced, and the host's is what this machine is."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from device_profiles import COMPONENTS, Profile, ProfileError, list_profiles, load_profile, profile_rows
from device_profiles.host import detect
from device_profiles.schema import FORMS, schema_table

ROOT = Path(__file__).parents[2]
WANTED = {
    "host",
    "jetson-orin",
    "jetson-orin-nano",
    "jetson-thor",
    "raspberry-pi-5",
    "intel-n100",
    "intel-lunar-lake",
    "iphone-16-pro",
    "macbook-m4",
    "android-snapdragon-8-elite",
    "rtx-4090",
    "h200",
    "browser-wasm",
}


def test_the_wanted_profiles_are_there() -> None:
    assert set(list_profiles()) >= WANTED


@pytest.mark.parametrize("name", list_profiles())
def test_every_value_has_its_source_or_is_null(name: str) -> None:
    profile = load_profile(name)
    for item in fields(Profile):
        value = getattr(profile, item.name)
        if value is None:
            assert profile.state(item.name) in ("unknown", "not applicable"), item.name
        elif item.metadata["sourced"]:
            assert len(profile.source(item.name)) > 3, item.name
        if item.name not in ("unknown", "not_applicable") and value is not None:
            assert profile.state(item.name) == "known", item.name


@pytest.mark.parametrize("name", list_profiles())
def test_every_component_has_backends(name: str) -> None:
    profile = load_profile(name)
    assert set(profile.components) == set(COMPONENTS)
    assert set(profile.backends) <= set(FORMS)
    assert profile.backends


@pytest.mark.parametrize("name", list_profiles())
def test_a_profile_travels_as_json(name: str) -> None:
    profile = load_profile(name)
    plain = profile.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == sorted(plain)
    assert json.dumps(plain) == json.dumps(load_profile(name).as_dict())


def test_known_values() -> None:
    orin = load_profile("jetson-orin")
    assert (orin.sm, orin.cuda_version, orin.tensorrt_version) == ("sm_87", "12.6", "10.3")
    assert orin.bandwidth_bytes_per_s == 204_800_000_000
    assert orin.components["lm"][:2] == ("tensorrt/fused/fp16", "tensorrt/typed/fp16")
    pi = load_profile("raspberry-pi-5")
    assert pi.isa is not None and "dotprod" in pi.isa and "i8mm" not in pi.isa
    assert pi.state("sm") == "not applicable"
    assert load_profile("iphone-16-pro").state("bandwidth_bytes_per_s") == "unknown"


def test_profiles_are_values() -> None:
    profile = load_profile("h200")
    with pytest.raises(FrozenInstanceError):
        profile.memory_bytes = 1  # type: ignore[misc]


def test_the_host_profile_is_this_machine() -> None:
    profile = load_profile("host")
    assert profile.arch == {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    assert profile.bandwidth_bytes_per_s is None  # until a benchmark measures it
    if platform.system() == "Linux":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert profile.memory_visible_bytes is not None
        assert profile.memory_visible_bytes <= pages
        flags = Path("/proc/cpuinfo").read_text()
        assert profile.isa
        for flag, kernel in (("avx2", " avx2"), ("avx512_vnni", " avx512_vnni"), ("dotprod", " asimddp")):
            assert (flag in profile.isa) == (kernel in flags), flag


def test_detection_gives_every_detected_key_a_value_or_none() -> None:
    values, sources = detect()
    assert set(values) == set(sources)
    assert values["os"] and values["arch"]


def test_rows_for_a_table() -> None:
    rows = {row["name"]: row for row in profile_rows()}
    assert set(rows) == set(list_profiles())
    assert rows["jetson-orin"]["bandwidth"] == "204.8 GB/s"
    assert rows["browser-wasm"]["memory"] == "unknown"
    assert "tensorrt" in rows["jetson-orin"]["backends"]


def test_the_readme_lists_the_schema_as_it_is() -> None:
    assert schema_table() in (ROOT / "device_profiles" / "README.md").read_text()


def test_the_command() -> None:
    command = [sys.executable, "-m", "device_profiles"]
    listed = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in WANTED)
    shown = subprocess.run([*command, "--show", "h200"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == load_profile("h200").as_dict()
    failed = subprocess.run([*command, "--show", "h2000"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Did you mean h200?" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_errors_say_what_where_and_the_way_out() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("jetson-oryn")
    assert caught.value.where == "profile 'jetson-oryn'"
    assert "jetson-orin" in caught.value.way_out
