"""BAD_INPUTS, row .pth: nothing but plain tensors gets as far as torch, and nothing is ever run."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.errors import UnsafePath, WeightsError
from exporters.pth_file import MAX_MEMBERS, load_pth
from exporters.student import load_student
from tests.conftest import MakeStudent
from tests.malformed.packages import copy_package, refused, relist


class Gadget:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _zip(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A small state dict as torch.save writes it."""
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    return path


def test_a_state_dict_is_read(good: Path) -> None:
    state = load_pth(good)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"weight": (2, 3), "bias": (2,)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_every_plain_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"x": torch.ones(2, 2, dtype=dtype), "p": torch.nn.Parameter(torch.ones(3))}, tmp_path / "m.pth")
    assert load_pth(tmp_path / "m.pth")["x"].equal(torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_gadget_is_never_run(tmp_path: Path, legacy: bool) -> None:
    ran = tmp_path / "ran"
    torch.save({"x": Gadget(f"touch {ran}")}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(WeightsError, "m.pth", action=lambda: load_pth(tmp_path / "m.pth"))
    assert not ran.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_gadget_inside_a_good_zip_is_never_run(good: Path, tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    members = _members(good)
    members["model/data.pkl"] = pickle.dumps({"x": Gadget(f"touch {ran}")}, protocol=protocol)
    _zip(good, members)
    refused(WeightsError, "pickle", action=lambda: load_pth(good))
    assert not ran.exists()


NAMED = [b"builtins\neval", b"builtins\nbytearray", b"torch\nload", b"torch.hub\nload", b"numpy\nndarray"]


@pytest.mark.parametrize("name", NAMED)
def test_a_pickle_may_name_only_what_tensors_need(good: Path, name: bytes) -> None:
    members = _members(good)
    members["model/data.pkl"] = b"\x80\x02c" + name + b"\n."
    _zip(good, members)
    refused(WeightsError, name.decode().replace("\n", "."), action=lambda: load_pth(good))


def test_a_pickle_that_is_damaged(good: Path) -> None:
    members = _members(good)
    members["model/data.pkl"] = members["model/data.pkl"][:40]
    refused(WeightsError, "pickle", action=lambda: load_pth(_zip(good, members)))


def test_a_zip_bomb(good: Path) -> None:
    members = _members(good) | {"model/data/9": bytes(200 << 20)}
    _zip(good, members, compression=zipfile.ZIP_DEFLATED)
    refused(WeightsError, "compressed", action=lambda: load_pth(good))


def test_members_that_overlap(good: Path) -> None:
    # Every entry of the directory says the same bytes are its own and far more of them than the file has.
    with zipfile.ZipFile(good, "a") as archive:
        first = archive.infolist()[0]
        for index in range(50):
            entry = zipfile.ZipInfo(f"model/data/{index + 10}")
            entry.header_offset, entry.file_size, entry.compress_size = first.header_offset, 1 << 30, 1 << 30
            entry.CRC = first.CRC
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
        archive._didModify = True  # type: ignore[attr-defined]
    refused(WeightsError, "claim", action=lambda: load_pth(good))


def test_too_many_members(good: Path) -> None:
    members = _members(good) | {f"model/data/{index + 10}": b"" for index in range(MAX_MEMBERS)}
    refused(WeightsError, "members", action=lambda: load_pth(_zip(good, members)))


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 0.5, 0.9, -1])
def test_a_truncated_zip(good: Path, keep: float) -> None:
    raw = good.read_bytes()
    good.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    refused(WeightsError, "model.pth", action=lambda: load_pth(good))


def test_a_changed_byte_in_a_member(good: Path) -> None:
    raw = bytearray(good.read_bytes())
    raw[raw.index(_members(good)["model/data/0"])] ^= 1
    good.write_bytes(raw)
    refused(WeightsError, "data/0", action=lambda: load_pth(good))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "model/../../evil", "a\\b"])
def test_a_member_that_leaves_the_folder(good: Path, name: str) -> None:
    members = _members(good) | {name: b"x"}
    refused(UnsafePath, "model.pth", action=lambda: load_pth(_zip(good, members)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(good: Path) -> None:
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("model/data.pkl", b"x")
    refused(UnsafePath, "twice", action=lambda: load_pth(good))


def test_a_legacy_tar(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    refused(WeightsError, "legacy", action=lambda: load_pth(path))


def test_a_legacy_pickle(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    refused(WeightsError, "legacy", action=lambda: load_pth(tmp_path / "m.pth"))


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        torch.ones(2),
        {},
        5,
        {"x": 1},
        {"x": {"y": torch.ones(2)}},
        {1: torch.ones(2)},
        {"x": "text"},
        {"x": None},
        OrderedDict(x=[torch.ones(1)]),
    ],
    ids=repr,
)
def test_leaves_that_are_not_tensors(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "m.pth")
    refused(WeightsError, "m.pth", action=lambda: load_pth(tmp_path / "m.pth"))


@pytest.mark.parametrize("value", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_not_plain(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save({"x": value}, tmp_path / "m.pth")
    refused(WeightsError, "m.pth", action=lambda: load_pth(tmp_path / "m.pth"))


def _rebuilt(good: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...], numel: int = 6) -> Path:
    """A zip whose pickle rebuilds one tensor from the 24 bytes of data/0, as told."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + pickle.dumps(numel, protocol=2)[2:-1]
        + b"tQ"
    )
    parts = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in (offset, size, stride))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + parts + b"\x89ccollections\nOrderedDict\n)RtR"
    members = _members(good)
    members["model/data.pkl"] = b"\x80\x02}(X\x01\x00\x00\x00x" + call + b"u."
    return _zip(good, members)


def test_a_rebuilt_tensor_within_its_storage_is_read(good: Path) -> None:
    assert tuple(load_pth(_rebuilt(good, 1, (2, 2), (2, 1)))["x"].shape) == (2, 2)


OUTSIDE: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = [
    (0, (100, 100), (100, 1), 6),
    (6, (1,), (1,), 6),
    (-4, (2,), (1,), 6),
    (1 << 60, (2,), (1,), 6),
    (0, (2, 2), (1 << 61, 1), 6),
    (0, (2,), (-1,), 6),
    (0, (-2,), (1,), 6),
    (0, (1 << 40,), (0,), 6),
    (0, (1 << 31, 1 << 31, 2), (0, 0, 0), 6),
    (0, (100,), (1,), 100),
    (0, (1,), (1,), 1 << 40),
    (0, (1,), (1,), -1),
]


@pytest.mark.parametrize(("offset", "size", "stride", "numel"), OUTSIDE)
def test_a_storage_or_stride_out_of_range(
    good: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...], numel: int
) -> None:
    refused(WeightsError, "model.pth", action=lambda: load_pth(_rebuilt(good, offset, size, stride, numel)))


def test_a_memo_index_that_would_take_all_memory(good: Path) -> None:
    members = _members(good)
    members["model/data.pkl"] = b"\x80\x02}r\xff\xff\xff\x7f."
    refused(WeightsError, "memo", action=lambda: load_pth(_zip(good, members)))


def test_a_storage_that_is_none(good: Path) -> None:
    members = _members(good)
    members["model/data.pkl"] = b"\x80\x02}(X\x01\x00\x00\x00xK\x05Qu."
    refused(WeightsError, "not a storage", action=lambda: load_pth(_zip(good, members)))


def test_special_files(tmp_path: Path, good: Path) -> None:
    (tmp_path / "link.pth").symlink_to(good)
    refused(UnsafePath, "link.pth", action=lambda: load_pth(tmp_path / "link.pth"))
    os.mkfifo(tmp_path / "pipe.pth")
    refused(UnsafePath, "pipe.pth", action=lambda: load_pth(tmp_path / "pipe.pth"))


def test_in_a_package_the_discretizer_refuses_it(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    package = copy_package(make_tiny_student(audio_weights="model.pth"), tmp_path / "package")
    path = package / "discretizers" / "audio" / "model.pth"
    state = torch.load(path, weights_only=True)
    ran = tmp_path / "ran"
    for value, word in (
        (state | {"extra": torch.ones(1)}, "extra"),
        ({name: tensor for name, tensor in state.items() if "conv2.bias" not in name}, "conv2.bias"),
        ({name: tensor[..., :1] for name, tensor in state.items()}, "config.json asks for"),
        ({name: tensor * float("nan") for name, tensor in state.items()}, "NaN"),
        (state | {"extra": Gadget(f"touch {ran}")}, "pickle"),
    ):
        torch.save(value, path)
        student = load_student(relist(package))
        refused(WeightsError, word, action=lambda student=student: student.discretizer("audio"))  # type: ignore[misc]
    assert not ran.exists()
