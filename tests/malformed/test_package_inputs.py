"""BAD_INPUTS, row Package: every damage ends in a typed error that names the file and the way out."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exporters.errors import ConfigError, ExportError, PackageError, UnsafePath, WeightsError
from exporters.package import validate, write_manifest
from exporters.safe_files import MAX_FILES
from exporters.student import load_student
from tests.malformed.packages import edit_json, load_refused, refused, relist
from tests.refusals import raises
from tools.tiny_student import modality_table

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_a_missing_listed_file_is_named(package: Path) -> None:
    (package / SHARD).unlink()
    load_refused(package, PackageError, SHARD, "missing")


def test_a_missing_shard_is_named_by_the_index(package: Path) -> None:
    (package / SHARD).unlink()
    load_refused(relist(package), PackageError, INDEX, SHARD)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer/tokenizer.json", "DATA_CARD.md"])
def test_a_required_component_that_is_absent_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    load_refused(relist(package), PackageError, name)


def test_index_names_an_absent_tensor(package: Path) -> None:
    edit_json(package / INDEX, lambda index: index["weight_map"].update({"model.ghost": SHARD}))
    load_refused(relist(package), WeightsError, INDEX, "model.ghost")


def test_index_leaves_a_tensor_out(package: Path) -> None:
    edit_json(package / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    load_refused(relist(package), WeightsError, INDEX, "model.norm.weight")


def test_index_places_a_tensor_in_the_wrong_shard(package: Path) -> None:
    edit_json(package / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": SHARD}))
    load_refused(relist(package), WeightsError, INDEX, "model.norm.weight")


def test_the_same_tensor_in_two_shards(package: Path) -> None:
    first = load_file(package / "model-00001-of-00002.safetensors")
    second = load_file(package / SHARD)
    save_file({**second, "model.norm.weight": first["model.norm.weight"]}, package / SHARD)
    load_refused(relist(package), WeightsError, "model.norm.weight", SHARD)


def test_a_shard_that_the_index_does_not_use(package: Path) -> None:
    save_file(load_file(package / SHARD), package / "model-00003-of-00003.safetensors")
    load_refused(relist(package), PackageError, "model-00003-of-00003.safetensors")


@pytest.mark.parametrize(
    "path", ["../model.safetensors", "/etc/passwd", "a/../../b", "C:model", "a\\b", "", "a\nb", "./x", "x" * 600]
)
def test_a_path_in_the_index_that_leaves_the_folder(package: Path, path: str) -> None:
    edit_json(package / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": path}))
    load_refused(relist(package), UnsafePath, INDEX)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "tokenizer/../../x"])
def test_a_path_in_the_manifest_that_leaves_the_folder(package: Path, path: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    load_refused(relist(package, lambda manifest: manifest["files"].update({path: entry})), UnsafePath, "package.json")


def test_a_discretizer_path_that_leaves_the_folder(package: Path) -> None:
    change: Callable[[dict[str, Any]], object] = lambda m: m["modalities"]["image"].update(discretizer="../image")  # noqa: E731
    load_refused(relist(package, change), UnsafePath, "modalities.image.discretizer")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "package.json", "tokenizer", "extra"])
def test_a_symbolic_link(package: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (package / name).exists():
        (package / name).rename(outside)
    else:
        outside.write_text("x")
    (package / name).symlink_to(outside)
    load_refused(package, UnsafePath, name, "symbolic link")


def test_a_dangling_symbolic_link_is_not_a_plain_folder(package: Path) -> None:
    (package / "package.json").unlink()
    (package / "package.json").symlink_to(package / "nowhere")
    load_refused(package, UnsafePath, "package.json")


def test_a_hard_link_from_outside(package: Path, tmp_path: Path) -> None:
    os.link(package / SHARD, tmp_path / "outside")
    load_refused(package, UnsafePath, SHARD, "hard-linked")


def test_hard_links_within_the_folder_are_fine(package: Path) -> None:
    (package / "DATA_CARD.md").unlink()
    os.link(package / "MODEL_CARD.md", package / "DATA_CARD.md")
    assert load_student(relist(package)).name == "tiny-llama-int4"


def test_a_fifo_is_refused_without_waiting(package: Path) -> None:
    os.mkfifo(package / "samples" / "pipe")
    load_refused(package, UnsafePath, "samples/pipe", "not a regular file")


def test_a_socket_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(package)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("door")
        load_refused(package, UnsafePath, "door")


def test_a_device_file_is_refused() -> None:
    from exporters.safe_files import check_regular, hash_file

    device = Path("/dev/zero")
    refused(UnsafePath, "/dev/zero", action=lambda: check_regular(device.lstat(), device))
    refused(UnsafePath, "/dev/zero", action=lambda: hash_file(device))


@pytest.mark.parametrize("pair", [("Config.json", "config.json"), ("MODEL_CARD.md", "Model_Card.md")])
def test_names_that_differ_only_in_case(package: Path, pair: tuple[str, str]) -> None:
    for name in pair:
        if not (package / name).exists():
            (package / name).write_text("{}")
    load_refused(package, UnsafePath, *pair, "case")


@pytest.mark.parametrize(
    "name", [SHARD, "tokenizer/tokenizer.json", "discretizers/image/model.safetensors", "config.json"]
)
def test_a_git_lfs_pointer(package: Path, name: str) -> None:
    digest = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n"
    (package / name).write_text(pointer)
    load_refused(package, WeightsError, name, "git lfs pull")
    load_refused(relist(package), WeightsError, name, "git lfs pull")


def test_a_changed_byte_is_named(package: Path) -> None:
    raw = bytearray((package / SHARD).read_bytes())
    raw[-1] ^= 1
    (package / SHARD).write_bytes(raw)
    load_refused(package, PackageError, SHARD, "SHA-256")


def test_a_file_that_grew_is_named(package: Path) -> None:
    with (package / "MODEL_CARD.md").open("a") as file:
        file.write("more")
    load_refused(package, PackageError, "MODEL_CARD.md", "size")


def test_an_unlisted_file_is_named(package: Path) -> None:
    (package / "evil.py").write_text("print()")
    load_refused(package, PackageError, "evil.py", "not listed")


def test_the_hash_of_the_whole(package: Path) -> None:
    load_refused(relist(package, lambda manifest: manifest.update(sha256="0" * 64)), PackageError, "package.json")


@pytest.mark.parametrize("name", [SHARD, "config.json", "package.json", "discretizers/audio/model.safetensors"])
def test_a_file_that_changes_during_the_build(package: Path, name: str) -> None:
    student = load_student(package)
    student.verify_unchanged()
    stamp = (package / name).stat()
    raw = bytearray((package / name).read_bytes())
    raw[-2] ^= 4
    (package / name).write_bytes(raw)
    os.utime(package / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    refused(PackageError, name, "changed", action=student.verify_unchanged)


def test_a_file_that_vanishes_or_turns_into_a_link_during_the_build(package: Path, tmp_path: Path) -> None:
    student = load_student(package)
    (package / "config.json").rename(tmp_path / "config.json")
    refused(PackageError, "config.json", action=student.verify_unchanged)
    (package / "config.json").symlink_to(tmp_path / "config.json")
    refused(PackageError, "config.json", action=student.verify_unchanged)


def test_a_grid_that_the_discretizer_does_not_have(package: Path) -> None:
    relist(package, lambda manifest: manifest["modalities"]["image"].update(grid=[4, 5]))
    load_refused(package, PackageError, "discretizers/image/config.json", "(4, 4)", "(4, 5)")


MISMATCHES: list[tuple[str, str, Any]] = [
    ("image", "num_vq_embeddings", 16),
    ("image", "block_out_channels", [8, 16]),
    ("audio", "codebook_size", 8),
    ("audio", "n_codebooks", 3),
    ("audio", "downsampling_ratios", [4, 8]),
    ("audio", "sampling_rate", 16000),
]


@pytest.mark.parametrize(("modality", "key", "value"), MISMATCHES)
def test_a_discretizer_that_does_not_match_its_range(package: Path, modality: str, key: str, value: Any) -> None:
    edit_json(package / "discretizers" / modality / "config.json", lambda config: config.update({key: value}))
    load_refused(relist(package), PackageError, f"discretizers/{modality}/config.json")


PREPROCESSING: list[tuple[str, str, Any]] = [
    ("image", "std", [0.0]),
    ("image", "mean", [0.5, 0.5]),
    ("image", "size", [16.5, 16]),
    ("image", "size", [15, 16]),
    ("image", "channels", 0),
    ("image", "gamma", 2.2),
    ("audio", "peak", 0),
    ("audio", "peak", True),
    ("audio", "sample_rate", "8000"),
    ("audio", "samples", 10**12),
]


@pytest.mark.parametrize(("modality", "key", "value"), PREPROCESSING)
def test_preprocessing_that_cannot_be(package: Path, modality: str, key: str, value: Any) -> None:
    path = package / "discretizers" / modality / "config.json"
    edit_json(path, lambda config: config["preprocessing"].update({key: value}))
    load_refused(relist(package), ConfigError, f"discretizers/{modality}/config.json", "preprocessing")


def test_preprocessing_that_is_absent(package: Path) -> None:
    edit_json(package / "discretizers" / "image" / "config.json", lambda config: config.pop("preprocessing"))
    load_refused(relist(package), ConfigError, "preprocessing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer_config.json", "discretizers/audio/config.json"])
@pytest.mark.parametrize("version", ["1.0.1", None, 1])
def test_component_versions_that_disagree(package: Path, name: str, version: object) -> None:
    edit_json(package / name, lambda config: config.update(student_version=version))
    load_refused(relist(package), PackageError, name, "1.0.0")


ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("image", {"tokens": [72, 103]}, "codebooks"),
    ("image", {"tokens": [60, 92]}, "overlap"),
    ("image", {"tokens": [104, 72]}, "empty token range"),
    ("image", {"tokens": [-1, 31]}, "tokens"),
    ("image", {"tokens": [72.0, 104]}, "tokens"),
    ("image", {"tokens": [72, 104, 136]}, "tokens"),
    ("audio", {"tokens": [105, 137]}, "past vocab_size"),
    ("audio", {"codebooks": 4, "codebook_size": 8}, "grid"),
    ("audio", {"codebooks": 0}, "codebooks"),
    ("audio", {"grid": [12, 1]}, "grid"),
    ("image", {"grid": []}, "grid"),
    ("image", {"begin": "</image>"}, "begin and end"),
    ("image", {"begin": None}, "begin missing"),
    ("image", {"discretizer": "discretizers/video"}, "discretizers/video/config.json"),
    ("text", {"grid": [1]}, "text takes no grid"),
    ("image", {"colour": 1}, "colour"),
]


@pytest.mark.parametrize(("modality", "change", "word"), ROWS)
def test_a_modality_row_that_does_not_hold(package: Path, modality: str, change: dict[str, Any], word: str) -> None:
    relist(package, lambda manifest: manifest["modalities"][modality].update(change))
    load_refused(package, PackageError, f"modalities.{modality}" if "overlap" not in word else "modalities", word)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"version": "1.0"},
        {"version": "01.0.0"},
        {"name": "../x"},
        {"name": ""},
        {"license": ""},
        {"files": []},
        {"modalities": {}},
        {"modalities": {"Image": {"tokens": [0, 1]}}},
        {"surprise": 1},
        {"sha256": 5},
    ],
)
def test_a_manifest_outside_the_schema(package: Path, change: dict[str, Any]) -> None:
    load_refused(relist(package, lambda manifest: manifest.update(change)), PackageError, "package.json")


def test_a_missing_licence(package: Path) -> None:
    load_refused(relist(package, lambda manifest: manifest.pop("license")), PackageError, "license")


def test_a_folder_without_anything(tmp_path: Path) -> None:
    load_refused(tmp_path, PackageError, "neither package.json nor config.json")
    load_refused(tmp_path / "nowhere", PackageError, "not a folder")


def test_too_many_files(package: Path) -> None:
    for index in range(MAX_FILES):
        (package / f"note-{index}").touch()
    refused(PackageError, f"more than {MAX_FILES} files", action=lambda: validate(package))


def test_the_writer_leaves_nothing_for_an_invalid_package(package: Path) -> None:
    (package / "package.json").unlink()
    table = modality_table()
    table["image"]["grid"] = [4, 5]
    with raises(ExportError):
        write_manifest(package, "x", "1.0.0", "MIT", table)
    assert not [path.name for path in package.iterdir() if "package.json" in path.name]


def test_the_writer_keeps_the_old_manifest_when_it_refuses(package: Path) -> None:
    before = (package / "package.json").read_bytes()
    refused(PackageError, "1.0.0", action=lambda: write_manifest(package, "x", "2.0.0", "MIT", modality_table()))
    assert (package / "package.json").read_bytes() == before
    assert json.loads(before)["version"] == "1.0.0"
