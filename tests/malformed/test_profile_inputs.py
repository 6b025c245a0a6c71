"""Profiles that are not sound: each ends in a ProfileError that names the file and the key, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from device_profiles import ProfileError, list_profiles, load_profile, load_profile_file
from device_profiles.loader import FOLDER
from tests.refusals import raises


def changed(tmp_path: Path, base: str, pattern: str, replacement: str) -> Path:
    """A copy of a shipped profile with one change (a regular expression over its text)."""
    text, count = re.subn(pattern, replacement, (FOLDER / f"{base}.toml").read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, pattern
    path = tmp_path / f"{base}.toml"
    path.write_text(text)
    return path


def refused(path: Path) -> ProfileError:
    with raises(ProfileError) as caught:
        load_profile_file(path)
    assert caught.value.what and caught.value.way_out
    assert path.name in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "host.toml", "", ".", "Host", "a/b", "x\0y", "..", "a" * 999]
)
def test_a_name_is_never_a_path(name: str) -> None:
    with raises(ProfileError, match="is not the name of a profile") as caught:
        load_profile(name)
    assert "jetson-orin" in str(caught.value)


def test_an_unknown_profile_lists_those_there_are() -> None:
    with raises(ProfileError) as caught:
        load_profile("raspberry-pi-6")
    assert "Did you mean raspberry-pi-5?" in str(caught.value)
    assert all(name in str(caught.value) for name in list_profiles())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("bandwith_bytes_per_s = 1", "bandwidth_bytes_per_s"),
        ("memory_gb = 64", "memory_bytes"),
        ("tpot = 5", "tpot_ms"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, written: str, meant: str) -> None:
    error = refused(changed(tmp_path, "jetson-orin", "^arch = ", f"{written}\narch = "))
    assert "unknown key" in error.what
    assert error.way_out == f"Did you mean {meant!r}?"


@pytest.mark.parametrize("group", ["unknown", "not_applicable"])
def test_an_unknown_key_among_the_absent_ones(tmp_path: Path, group: str) -> None:
    error = refused(changed(tmp_path, "jetson-orin", f"^{group} = \\[", f'{group} = ["tensorrt_versions", '))
    assert error.way_out == "Did you mean 'tensorrt_version'?"
    assert group in error.where


def test_a_source_for_an_unknown_key(tmp_path: Path) -> None:
    error = refused(changed(tmp_path, "h200", r"^\[sources\]", '[sources]\nbandwidth = "x"'))
    assert error.way_out == "Did you mean 'bandwidth_bytes_per_s'?"


def test_a_missing_key(tmp_path: Path) -> None:
    assert "missing key(s) max_batch" in refused(changed(tmp_path, "h200", r"^max_batch = .*\n", "")).what


def test_a_value_and_unknown_at_once(tmp_path: Path) -> None:
    error = refused(changed(tmp_path, "h200", r"^unknown = \[", 'unknown = ["sm", '))
    assert error.what == "'sm' has a value too"


def test_a_key_that_must_have_a_value(tmp_path: Path) -> None:
    path = changed(tmp_path, "h200", r"^max_batch = .*\n", "")
    path.write_text(path.read_text().replace("unknown = [", 'unknown = ["max_batch", '))
    assert refused(path).where == "h200.toml: max_batch"


@pytest.mark.parametrize(
    ("pattern", "replacement", "key"),
    [
        (r"^memory_bytes = .*", 'memory_bytes = "64 GB"', "memory_bytes"),
        (r"^memory_bytes = .*", "memory_bytes = 64", "memory_bytes"),
        (r"^memory_bytes = .*", "memory_bytes = 64.0e9", "memory_bytes"),
        (r"^memory_bytes = .*", "memory_bytes = true", "memory_bytes"),
        (r"^memory_bytes = .*", "memory_bytes = -1", "memory_bytes"),
        (r"^bandwidth_bytes_per_s = .*", "bandwidth_bytes_per_s = 205", "bandwidth_bytes_per_s"),
        (r"^same_top = .*", "same_top = 99.5", "same_top"),
        (r"^same_top = .*", "same_top = nan", "same_top"),
        (r"^kl = .*", "kl = inf", "kl"),
        (r"^ttft_ms = .*", 'ttft_ms = "200 ms"', "ttft_ms"),
        (r"^dtypes = .*", 'dtypes = "float32"', "dtypes"),
        (r"^dtypes = .*", 'dtypes = ["float33"]', "dtypes"),
        (r"^os = .*", 'os = "beos"', "os"),
        (r"^soc = .*", 'soc = "  "', "soc"),
        (r"^name = .*", 'name = "other"', "name"),
        (r"^tvm_target = .*", 'tvm_target = "llvm"', "tvm_target"),
        (r"^lm = .*", 'lm = "onnx/fused/exact"', "components.lm"),
        (r"^lm = .*", 'lm = ["onnx/ir/exact"]', "components.lm"),
        (r"^lm = .*", 'lm = ["onxx/fused/exact"]', "components.lm"),
        (r"^lm = .*", 'lm = ["onnx/fused/exact", "onnx/fused/exact"]', "components.lm"),
        (r"^lm = .*", "lm = []", "components.lm"),
        (r"^lm = .*", 'lm = ["onnx/fused/exact"]\nvideo_decoder = ["onnx/fused/exact"]', "components.video_decoder"),
    ],
)
def test_a_wrong_type_or_unit(tmp_path: Path, pattern: str, replacement: str, key: str) -> None:
    assert refused(changed(tmp_path, "jetson-orin", pattern, replacement)).where == f"jetson-orin.toml: {key}"


@pytest.mark.parametrize("key", ["bandwidth_bytes_per_s", "sm", "fast_kl"])
def test_a_value_without_a_source(tmp_path: Path, key: str) -> None:
    path = tmp_path / "h200.toml"
    text, sources = (FOLDER / "h200.toml").read_text().split("[sources]")
    path.write_text(text + "[sources]" + re.sub(rf"\n{key} = .*", "", sources))
    error = refused(path)
    assert error.where == f"h200.toml: {key}"
    assert "without a source" in error.what


@pytest.mark.parametrize(
    ("base", "pattern", "replacement", "said"),
    [
        ("jetson-orin", r"^dtypes = .*", 'dtypes = ["float16", "fp4"]', "fp4 needs sm_100 or newer, this is sm_87"),
        ("jetson-orin", r"^dtypes = .*", 'dtypes = ["float16", "fp8"]', "fp8 needs sm_89"),
        ("h200", r"^dtypes = .*", 'dtypes = ["fp4"]', "fp4 needs sm_100"),
        ("raspberry-pi-5", r"^dtypes = .*", 'dtypes = ["fp8"]', "has no sm"),
        ("jetson-orin", r"^lm = .*", 'lm = ["coreml/mlprogram/fp16"]', "Core ML runs on macOS and iOS only"),
        ("raspberry-pi-5", r"^image_encoder = .*", 'image_encoder = ["tensorrt/typed/fp16"]', "needs an NVIDIA GPU"),
        ("iphone-16-pro", r"^lm = .*", 'lm = ["openvino/ir/exact"]', "OpenVINO does not run on ios"),
        ("iphone-16-pro", r"^lm = .*", 'lm = ["onnx/fused/exact"]', "is not applicable, yet components name onnx"),
        ("raspberry-pi-5", r"^isa = .*", 'isa = ["neon", "dotprod", "i8mm"]', "has no i8mm"),
        ("raspberry-pi-5", r"^isa = .*", 'isa = ["avx2", "dotprod"]', "'avx2' is no extension of aarch64"),
        ("raspberry-pi-5", r"^int8_isa = .*", 'int8_isa = "i8mm"', "i8mm is not in isa"),
        ("raspberry-pi-5", r"^int8_isa = .*", 'int8_isa = "fp16"', "has no int8 dot product"),
        ("intel-n100", r"^isa = .*", 'isa = ["avx_vnni", "avx512_vnni"]', "has no avx512_vnni"),
        ("intel-lunar-lake", r"^isa = \[", 'isa = ["amx_int8", ', "has no amx_int8"),
        ("h200", r"^sm = .*", 'sm = "sm_91"', "no compute capability known"),
        ("raspberry-pi-5", r"^rss_bytes = .*", "rss_bytes = 99_000_000_000", "is more than the device has"),
    ],
)
def test_pairs_that_cannot_be(tmp_path: Path, base: str, pattern: str, replacement: str, said: str) -> None:
    assert said in refused(changed(tmp_path, base, pattern, replacement)).what


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe name",
        b"\xef\xbb\xbfname = 'x'",
        b"name = 'a'\nname = 'b'",
        b"x = " + b"[" * 100_000,
        b"name =",
        b"",
        b"# " + b"x" * (2 << 20),
    ],
    ids=["utf-16", "byte-order mark", "key twice", "deep", "cut off", "empty", "huge"],
)
def test_files_that_are_not_profiles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "jetson-orin.toml"
    path.write_bytes(data)
    refused(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.toml")
    (tmp_path / "folder.toml").mkdir()
    refused(tmp_path / "folder.toml")
