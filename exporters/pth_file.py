"""Weights in a .pth file: only as a zip of plain tensors, and only through torch's weights_only unpickler.

torch.save writes a zip (github.com/pytorch/pytorch, torch/serialization.py) of uncompressed members
<root>/data.pkl and <root>/data/<key>. A pickle is a program, so before torch reads it: the zip must hold nothing but
what torch writes, and the pickle may name nothing but what a state dict of tensors needs. There is no fallback.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from exporters.errors import UnsafePath, WeightsError
from exporters.safe_files import check_regular, check_relative, refuse_lfs_pointer

if TYPE_CHECKING:
    import torch

MAX_MEMBERS = 10_000
MAX_PICKLE = 8 << 20
# Bytes per element.
_STORAGES = {
    "FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in _STORAGES),
}


def _refuse(
    what: str, path: Path, way_out: str = "Save the state dict again with torch.save, or as safetensors"
) -> NoReturn:
    raise WeightsError(what, where=str(path), way_out=way_out)


def _read_zip(path: Path) -> tuple[bytes, dict[str, int]]:
    """The bytes of data.pkl and the size of every storage by its key, once the zip is known to be harmless."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        _refuse("is not a zip file: a legacy pickle or tar, or damaged", path)
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                _refuse(f"holds {len(members)} members, the limit is {MAX_MEMBERS}", path)
            names = set()
            for member in members:
                check_relative(member.filename, str(path))
                if member.filename in names:
                    raise UnsafePath(f"holds {member.filename!r} twice", where=str(path), way_out="Save it again")
                names.add(member.filename)
                if member.compress_type != zipfile.ZIP_STORED:
                    _refuse(f"the member {member.filename} is compressed, which torch.save never does", path)
            # Members stored as they are cannot take more than the file; overlapping ones would.
            if (total := sum(member.file_size for member in members)) > size:
                _refuse(f"its members claim {total} bytes, the file has {size}", path)
            pickles = [member for member in members if member.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                _refuse(f"holds {len(pickles)} data.pkl, or one over {MAX_PICKLE} bytes", path)
            if (damaged := archive.testzip()) is not None:
                _refuse(f"the member {damaged} is damaged", path, "Fetch it again")
            root = pickles[0].filename.removesuffix("data.pkl") + "data/"
            sizes = {
                name.removeprefix(root): archive.getinfo(name).file_size for name in names if name.startswith(root)
            }
            return archive.read(pickles[0]), sizes
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        _refuse(f"is not a whole zip file ({error})", path, "Fetch it again")


class _StorageReader(pickle.Unpickler):
    """Runs a pickle whose names were checked with stand-ins for all of them, to see which storages it claims."""

    def __init__(self, data: bytes, sizes: Mapping[str, int], path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._sizes, self._path = sizes, path

    def find_class(self, module: str, name: str) -> Any:
        if name == "OrderedDict":
            return OrderedDict
        return name if name in _STORAGES else lambda *parts: None

    def persistent_load(self, pid: Any) -> None:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or pid[1] not in _STORAGES:
            _refuse(f"its pickle claims {pid!r:.100}, which is not a storage", self._path)
        kind, key, count = pid[1], pid[2], pid[4]
        size = self._sizes.get(key) if isinstance(key, str) else None
        if isinstance(count, bool) or not isinstance(count, int) or size != count * _STORAGES[kind]:
            _refuse(
                f"the storage {key!r:.40} claims {count!r:.40} values of {kind}, the file has {size} bytes", self._path
            )


def _check_pickle(data: bytes, sizes: Mapping[str, int], path: Path) -> None:
    """Refuse a pickle that names anything beyond tensors, before torch unpickles it."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and argument not in _ALLOWED:
                _refuse(f"its pickle calls {str(argument).replace(' ', '.')!r}", path, "Only tensors are accepted")
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"):
                _refuse(f"its pickle uses {opcode.name}", path, "Only tensors are accepted")
            # The memo is an array: one high index would allocate it whole.
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
                _refuse("its pickle is damaged (memo index)", path, "Fetch it again")
        _StorageReader(data, sizes, path).load()
    except WeightsError:
        raise
    except Exception as error:  # an unpickler raises whatever damaged content leads to; nothing in it is ours
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"its pickle is damaged ({reason})", where=str(path), way_out="Fetch it again") from error


def _check_leaf(name: Any, leaf: Any, path: Path) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(leaf, torch.Tensor):
        _refuse(f"{name!r:.100} is a {type(leaf).__name__}, not a tensor", path, "Save module.state_dict() alone")
    if leaf.layout != torch.strided or leaf.device.type != "cpu":
        _refuse(f"{name} is not a plain tensor in memory", path)
    # A zero stride lets a few bytes claim any size.
    if leaf.numel() * leaf.element_size() > leaf.untyped_storage().nbytes():
        _refuse(f"{name} claims {leaf.numel()} values, more than its storage holds", path)


def load_pth(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor (memory-mapped, stored dtype) of a state dict saved by torch.save.

    Raises WeightsError (UnsafePath for member names) for everything else.
    """
    import torch

    check_regular(path.lstat(), path)
    refuse_lfs_pointer(path)
    _check_pickle(*_read_zip(path), path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types here, all about the file's content
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"torch refuses it ({reason})", where=str(path), way_out="Save it again with torch.save"
        ) from error
    if not isinstance(state, dict) or not state:
        _refuse(f"holds a {type(state).__name__}, not a state dict", path, "Save module.state_dict() alone")
    for name, leaf in state.items():
        _check_leaf(name, leaf, path)
    return {name: leaf.detach() for name, leaf in state.items()}
