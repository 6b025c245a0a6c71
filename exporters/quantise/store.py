"""Where the build keeps what it quantises: one small file for each matrix, and exact changes of float tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors.numpy import load_file, save_file
from torch import Tensor

from exporters.activations import Activation
from exporters.checkpoint import Checkpoint
from exporters.quantise.grids import Grid, Width
from exporters.quantized import QuantizedTensor
from exporters.safetensors_header import TensorInfo
from exporters.student import Student


@dataclass(frozen=True)
class Fold:
    """A change of a float tensor: ((w + offset) / rows) * columns - offset.

    Attributes:
        rows, columns: factors along the first and last axis, or None.
        offset: 1 where a norm multiplies with 1 + weight.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    offset: float = 0.0

    def apply(self, values: Tensor) -> Tensor:
        """float32, of the shape of ``values``."""
        out = values.float() + self.offset
        if self.rows is not None:
            out = out / self.rows.reshape(-1, *(1,) * (out.dim() - 1))
        if self.columns is not None:
            out = out * self.columns
        return out - self.offset


class FoldedCheckpoint(Checkpoint):
    """A checkpoint some of whose float tensors are changed when they are read."""

    def __init__(self, checkpoint: Checkpoint, folds: Mapping[str, tuple[Fold, ...]]) -> None:
        self._checkpoint, self._folds = checkpoint, folds
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors

    def tensor(self, name: str) -> Tensor:
        """As stored, or float32 where it is changed."""
        values = self._checkpoint.tensor(name)
        for fold in self._folds.get(name, ()):
            values = fold.apply(values)
        return values


class Store(Mapping[str, QuantizedTensor]):
    """Module name -> the matrix that was put there; read from its file on access, nothing is kept.

    Args:
        folder: an existing folder that lives as long as the student is used.
        source: what each QuantizedTensor names as its source.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._source = folder, source
        self.widths: dict[str, Width] = {}
        self.folds: dict[str, tuple[Fold, ...]] = {}
        #: module -> how its input is rounded
        self.activations: dict[str, Activation] = {}

    def put(self, module: str, grid: Grid, width: Width) -> None:
        """Writes a matrix, in the place of the one that the module had."""
        tensor = grid.tensor(width, self._source)
        values = {"codes": tensor.codes, "scales": tensor.scales, "zero_points": tensor.zero_points}
        # A new file: the old one may still be mapped.
        save_file({name: each for name, each in values.items() if each is not None}, self._path(module, width))
        self.widths[module] = width

    def drop(self, module: str) -> None:
        """The module stays in float, its input as well."""
        del self.widths[module]
        self.activations.pop(module, None)

    def fold(self, name: str, fold: Fold) -> None:
        """Adds a change of a float tensor."""
        self.folds[name] = (*self.folds.get(name, ()), fold)

    def __getitem__(self, module: str) -> QuantizedTensor:
        width = self.widths[module]
        held = load_file(self._path(module, width))
        rows, groups = held["scales"].shape
        columns = held["codes"].shape[1] * 8 // width.bits
        group = columns // groups
        zeros = held.get("zero_points")
        shape = (rows, columns)
        return QuantizedTensor(held["codes"], held["scales"], zeros, width.bits, group, shape, self._source, "float16")

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def _path(self, module: str, width: Width) -> Path:
        return self._folder / f"{module}.{width.bits}.safetensors"


def folded(student: Student, store: Store) -> Student:
    """The float student with the store's changes, which computes the same."""
    folds = {student.tensors[name].name: each for name, each in store.folds.items()}
    return dataclasses.replace(student, checkpoint=FoldedCheckpoint(student.checkpoint, folds))


def stored(student: Student, store: Store) -> Student:
    """The student with the store's matrices in the place of its own."""
    held = {f"{module}.weight" for module in store}
    tensors = {name: info for name, info in student.tensors.items() if name not in held}
    return dataclasses.replace(
        folded(student, store),
        tensors=MappingProxyType(tensors),
        quantized=store,
        activations=MappingProxyType(store.activations),
    )
