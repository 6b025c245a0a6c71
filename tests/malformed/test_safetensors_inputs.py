"""BAD_INPUTS, row safetensors: the header is checked whole before any tensor is read."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from exporters.errors import ConfigError, ExportError, QuantizationError, UnsafePath, WeightsError
from exporters.safetensors_header import MAX_HEADER, MAX_TENSORS, read_header
from tests.malformed.packages import load_refused, read_safetensors, refused, relist, write_safetensors

SHARD = "model-00001-of-00002.safetensors"
NORM = "model.norm.weight"
Header = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test writes its file."""
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("raw", [b"", b"\x00", b"1234567", struct.pack("<Q", 2), struct.pack("<Q", 3) + b"{}"])
def test_a_file_that_is_too_short(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    refused(WeightsError, "x.safetensors", action=lambda: read_header(path))


@pytest.mark.parametrize("length", [100, 1 << 27, MAX_HEADER + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_length_past_the_file_or_the_limit(path: Path, length: int) -> None:
    write_safetensors(path, b"{}", b"", length)
    refused(WeightsError, f"header of {length} bytes", action=lambda: read_header(path))


def test_a_header_of_a_hundred_megabytes_is_not_read(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(200 << 20)
    refused(WeightsError, str(100 << 20), action=lambda: read_header(path))


def test_a_hundred_thousand_tensors(path: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    write_safetensors(path, {f"t{index}": entry for index in range(100_000)}, b"")
    start = time.monotonic()
    refused(WeightsError, f"more than {MAX_TENSORS}", action=lambda: read_header(path))
    assert time.monotonic() - start < 20


def _f32(*offsets: int, shape: list[int] | None = None) -> Header:
    return {"dtype": "F32", "shape": [1] if shape is None else shape, "data_offsets": list(offsets)}


HEADERS: list[tuple[str, Header | bytes, int, str]] = [
    ("overlap", {"a": _f32(0, 4), "b": _f32(2, 6)}, 6, "overlaps"),
    ("same place", {"a": _f32(0, 4), "b": _f32(0, 4)}, 4, "overlaps"),
    ("gap", {"a": _f32(0, 4), "b": _f32(8, 12)}, 12, "gap"),
    ("gap at the start", {"a": _f32(4, 8)}, 8, "gap"),
    ("trailing", {"a": _f32(0, 4)}, 5, "1 bytes follow"),
    ("trailing, empty", {}, 5, "5 bytes follow"),
    ("past the end", {"a": _f32(0, 4)}, 3, "do not lie within"),
    ("reversed", {"a": _f32(4, 0)}, 4, "do not lie within"),
    ("negative", {"a": _f32(-4, 0)}, 4, "-4"),
    ("not whole", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}, 4, "0.0"),
    ("three offsets", {"a": _f32(0, 4, 4)}, 4, "data_offsets"),
    ("overflow", {"a": _f32(0, 4, shape=[2**32, 2**32, 2])}, 4, "takes"),
    ("overflow to zero", {"a": _f32(0, 0, shape=[2**32, 2**32])}, 0, "takes"),
    ("dimension too large", {"a": _f32(0, 4, shape=[2**64 + 1])}, 4, "2**63"),
    ("negative dimension", {"a": _f32(0, 4, shape=[-1, -1])}, 4, "-1"),
    ("true dimension", {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "True"),
    ("many dimensions", {"a": _f32(0, 4, shape=[1] * 17)}, 4, "short list"),
    ("size and dtype", {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}, 4, "takes 2 bytes"),
    ("unknown dtype", {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, 4, "F4"),
    ("dtype is a list", {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "dtype"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "exactly"),
    ("extra field", {"a": _f32(0, 4) | {"strides": [1]}}, 4, "exactly"),
    ("entry is a list", {"a": [1]}, 0, "exactly"),
    ("header is a list", b"[]", 0, "not a JSON object"),
]


@pytest.mark.parametrize(("header", "size", "word"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_a_header_that_does_not_hold(path: Path, header: Header | bytes, size: int, word: str) -> None:
    write_safetensors(path, header, bytes(size))
    refused(WeightsError, "x.safetensors", word, action=lambda: read_header(path))


@pytest.mark.parametrize("raw", [b"{", b"nonsense", b'{"a": NaN}', b"\xff", b"[" * 10_000])
def test_a_header_that_is_not_json(path: Path, raw: bytes) -> None:
    write_safetensors(path, raw, b"")
    refused(ConfigError, "x.safetensors", action=lambda: read_header(path))


def test_a_duplicate_key(path: Path) -> None:
    entry = json.dumps(_f32(0, 4))
    write_safetensors(path, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(4))
    refused(ConfigError, "x.safetensors", "'a'", "twice", action=lambda: read_header(path))


def test_special_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    refused(WeightsError, "link", action=lambda: read_header(tmp_path / "link"))
    refused(UnsafePath, "regular", action=lambda: read_header(Path("/dev/zero")))
    refused(WeightsError, "nowhere", action=lambda: read_header(tmp_path / "nowhere"))


def test_what_the_library_writes_is_read(path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, 5, dtype=torch.int8), "c": torch.tensor(1.0).half()}
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: info.shape for name, info in found.items()} == {"a": (2, 3), "b": (0, 5), "c": ()}
    assert {name: info.dtype for name, info in found.items()} == {"a": "F32", "b": "I8", "c": "F16"}


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_read_as_the_library_does_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    raw = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}))
    raw[place % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except ExportError as error:
        assert error.way_out
        return
    loaded = load_file(path)  # what passes our check, the library reads too
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {n: i.shape for n, i in found.items()}


def _change(package: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], shard: str = SHARD) -> Path:
    tensors = load_file(package / shard)
    tensors[name] = change(tensors[name])
    save_file(tensors, package / shard)
    return relist(package)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(package: Path, value: float, dtype: torch.dtype) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype)
        tensor[-1] = value
        return tensor

    load_refused(_change(package, NORM, change), WeightsError, NORM, "NaN or infinite")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_a_scale_that_cannot_be(package: Path, module: str, value: float) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[3, -1] = value
        return scale

    load_refused(_change(package, f"{module}.weight_scale", change), QuantizationError, f"{module}.weight_scale")


def test_a_weight_of_the_wrong_dtype(package: Path) -> None:
    load_refused(_change(package, NORM, lambda tensor: tensor.int()), WeightsError, NORM, "I32")


def test_a_weight_of_the_wrong_shape(package: Path) -> None:
    load_refused(_change(package, NORM, lambda tensor: tensor[:-1].clone()), WeightsError, NORM, "[63]", "[64]")


def test_a_discretizer_with_weights_that_are_not_finite(package: Path) -> None:
    from exporters.student import load_student

    path = package / "discretizers" / "image" / "model.safetensors"
    tensors = load_file(path)
    tensors["quantize.embedding.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    student = load_student(relist(package))
    refused(WeightsError, "quantize.embedding.weight", action=lambda: student.discretizer("image"))


def test_a_damaged_header_in_a_package(package: Path) -> None:
    header, data = read_safetensors(package / SHARD)
    header[NORM]["data_offsets"][1] += 4
    write_safetensors(package / SHARD, header, data)
    load_refused(relist(package), WeightsError, SHARD, NORM)
