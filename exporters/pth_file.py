"""Weights in a .pth file: only as a zip of plain tensors, and only through torch's weights_only unpickler.

torch.save writes a zip (github.com/pytorch/pytorch, torch/serialization.py) of uncompressed members
<root>/data.pkl and <root>/data/<key>. A pickle is a program, so before torch reads it: the zip must hold nothing but
what torch writes, and the pickle may name nothing but what a state dict of tensors needs. There is no fallback.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from exporters.errors import UnsafePath, WeightsError
from exporters.safe_files import check_regular, check_relative, refuse_lfs_pointer

if TYPE_CHECKING:
    import torch

MAX_MEMBERS = 10_000
MAX_PICKLE = 8 << 20
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}


def _refuse(
    what: str, path: Path, way_out: str = "Save the state dict again with torch.save, or as safetensors"
) -> NoReturn:
    raise WeightsError(what, where=str(path), way_out=way_out)


def _pickle_of(path: Path) -> bytes:
    """The bytes of data.pkl, once the zip around it is known to be harmless."""
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
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        _refuse(f"is not a whole zip file ({error})", path, "Fetch it again")


def _check_pickle(data: bytes, path: Path) -> None:
    """Refuse a pickle that names anything beyond tensors, before anything is unpickled."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and argument not in _ALLOWED:
                _refuse(f"its pickle calls {str(argument).replace(' ', '.')!r}", path, "Only tensors are accepted")
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"):
                _refuse(f"its pickle uses {opcode.name}", path, "Only tensors are accepted")
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        _refuse(f"its pickle is damaged ({error})", path, "Fetch it again")


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
    _check_pickle(_pickle_of(path), path)
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
