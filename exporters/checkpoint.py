"""The weight files of a checkpoint: which shard holds which tensor, and reading one at a time, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from exporters.errors import PackageError, WeightsError
from exporters.progress import Bytes, ignore
from exporters.safe_files import check_relative
from exporters.safetensors_header import FLOATS, TensorInfo, read_header
from exporters.strict_json import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 1 << 22  # elements per step of a streaming check
# Bytes read through one mapping; then it is renewed, so that the pages of what was read leave the resident memory.
_RENEWED = 1 << 28


class Checkpoint:
    """Tensors by name over one or several safetensors files.

    Headers are validated when it is opened; data stays on disk, mapped. `tensor` gives a view of the mapping.
    """

    def __init__(self, folder: Path, shards: Iterable[str]) -> None:
        self._files: dict[Path, Any] = {}
        self._read = 0
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(shards)):
            for name, info in read_header(folder / shard).items():
                if name in tensors:
                    raise WeightsError(
                        f"the tensor {name!r} is in {tensors[name].file.name} and in {shard}",
                        where=str(folder),
                        way_out="Keep it in one shard",
                    )
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor in its stored dtype; memory-mapped, so do not write to it."""
        from safetensors import SafetensorError

        info = self.tensors[name]
        self._read += info.nbytes
        if self._read > _RENEWED:  # tensors that are still in use keep the old mapping
            self._files.clear()
            self._read = info.nbytes
        try:
            return self._open(info.file).get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(str(error), where=f"{info.file}: {name}", way_out="Fetch it again") from error

    def metadata(self, name: str) -> Mapping[str, str]:
        """The text entries in the header of the file that holds a tensor."""
        return self._open(self.tensors[name].file).metadata() or {}

    def _open(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt")
        return self._files[file]

    def check_finite(self, names: Iterable[str], progress: Bytes = ignore) -> None:
        """Refuse NaN and infinities in float tensors, in one pass of bounded memory."""
        for name in names:
            if self.tensors[name].dtype in FLOATS:
                check_finite(self.tensor(name), f"{self.tensors[name].file.name}: {name}")
                progress(self.tensors[name].nbytes)


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """Refuse NaN and infinities in a float tensor, in steps of bounded memory."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # min and max propagate NaN and show infinities without a mask as large as the tensor.
        low, high = flat[start : start + _CHUNK].aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise WeightsError(
                "holds NaN or infinite values",
                where=where,
                way_out="The training run diverged or the file is damaged: export the weights again",
            )


def open_checkpoint(folder: Path, files: Iterable[str]) -> Checkpoint:
    """Open the model*.safetensors of a folder, by its index when there is one.

    The index and the shards must agree exactly: no missing shard, no absent or unlisted tensor, no unused shard.
    """
    names = set(files)
    shards = {name for name in names if name.startswith("model") and name.endswith(".safetensors") and "/" not in name}
    if INDEX not in names:
        if SINGLE in shards:
            if len(shards) > 1:
                raise WeightsError(
                    f"{SINGLE} beside other shards", where=str(folder), way_out=f"Add {INDEX} or remove the others"
                )
            return Checkpoint(folder, [SINGLE])
        raise WeightsError(
            f"has neither {SINGLE} nor {INDEX}", where=str(folder), way_out="Add the weights in safetensors form"
        )
    where = str(folder / INDEX)
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise WeightsError("weight_map is not an object of file names", where=where, way_out="Write the index again")
    for shard in sorted(set(placed.values())):
        check_relative(shard, where)
        if shard not in shards:
            raise PackageError(f"names the shard {shard}, which is missing", where=where, way_out="Fetch the shard")
    if unused := shards - set(placed.values()):
        raise PackageError(f"does not use {min(unused)}", where=where, way_out="Remove the file, or list its tensors")
    checkpoint = Checkpoint(folder, placed.values())
    for name, shard in placed.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].file.name != shard:
            raise WeightsError(f"places {name!r} in {shard}, which does not hold it", where=where, way_out="Correct it")
    if extra := set(checkpoint.tensors) - set(placed):
        raise WeightsError(f"does not list {min(extra)!r}", where=where, way_out="Write the index again")
    return checkpoint
