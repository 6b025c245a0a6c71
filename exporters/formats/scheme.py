"""What every checkpoint format gives: a Scheme per quantised module, and the refusals that all of them share.

A format is a file here and a row in exporters/formats/__init__.py. Its function reads config.json's
quantization_config into a Scheme per module; a Scheme knows the tensors a weight is stored in and how they are decoded.
A decoder only moves bits; it never rounds, so codes, scales and zero points are those of the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from exporters.activations import Activation
from exporters.errors import QuantizationError
from exporters.quantized import AGAIN, QuantizedTensor

if TYPE_CHECKING:
    import torch

    from exporters.checkpoint import Checkpoint

Array = np.ndarray[Any, Any]
Shape = tuple[int, int]
Read = Callable[[str], "torch.Tensor"]
#: local name of a tensor -> (safetensors dtypes, allowed shapes)
Layout = dict[str, tuple[frozenset[str], tuple[tuple[int, ...], ...]]]

WHERE = "config.json: quantization_config"
SCALES = frozenset({"F32", "F16", "BF16"})


class Scheme(ABC):
    """How the weight of one module is stored."""

    @abstractmethod
    def layout(self, shape: Shape) -> Layout:
        """The tensors that a weight of ``shape`` [N, K] is stored in, by their names within the module."""

    @abstractmethod
    def decode(self, read: Read, module: str, shape: Shape) -> QuantizedTensor:
        """The weight of ``module``. Raises QuantizationError for values that cannot be."""

    def activation(self, read: Read, module: str) -> Activation | None:
        """How the input of ``module`` is rounded, None where it is not."""
        return None

    @property
    def rounds_input(self) -> bool:
        """Whether config.json asks for a rounded input of every module of this scheme."""
        return False

    def check(self, module: str, shape: Shape) -> None:
        """Raises QuantizationError for a weight whose shape the scheme cannot have."""
        return

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """Names of stored tensors of ``module`` that say nothing, so that they can be passed over.

        Raises QuantizationError for those that say something that is not carried over.
        """
        return iter(())


#: (quantization_config, the model's Linear and Embedding modules with their class names, the checkpoint) -> schemes
Reader = Callable[[Mapping[str, Any], Mapping[str, tuple[str, ...]], "Checkpoint"], dict[str, Scheme]]


def refuse(what: str, at: str, way_out: str) -> NoReturn:
    """Refuses a field of quantization_config; ``at`` continues the path, as in ".bits"."""
    raise QuantizationError(what, where=f"{WHERE}{at}", way_out=way_out)


def whole(
    config: Mapping[str, Any], key: str, allowed: Iterable[int] | None, at: str = "", *, channel: int = -1
) -> int:
    """A whole number of the config: one of ``allowed``, or any positive one (None) or ``channel``."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(f"{key} is {value!r:.80}", at, "Give a whole number")
    if allowed is not None and value not in allowed:
        refuse(f"{key} is {value}", at, f"Supported: {', '.join(map(str, allowed))}")
    if allowed is None and value < 1 and value != channel:
        refuse(f"{key} is {value}", at, f"Give a positive number, or {channel} for one group per row")
    return value


def flag(config: Mapping[str, Any], key: str, at: str = "") -> bool:
    """A boolean that the config must state."""
    value = config.get(key)
    if not isinstance(value, bool):
        refuse(f"does not state whether weights are {key}" if value is None else f"{key} is {value!r:.80}", at,
               f'Write "{key}": true or false')  # fmt: skip
    return value


def ceil(count: int, by: int) -> int:
    """count / by, rounded up."""
    return -(-count // by)


def check_group(module: str, group: int, columns: int) -> None:
    """Refuses groups of columns that do not fill a row."""
    if columns % group:
        raise QuantizationError(
            f"group_size {group} does not divide K = {columns}",
            where=f"{module}.weight",
            way_out="Quantise with a group size that divides it; padding would change the weights",
        )


def dtype_name(tensor: torch.Tensor) -> str:
    """ "float16" of torch.float16."""
    return str(tensor.dtype).removeprefix("torch.")


def positive_scales(stored: torch.Tensor, where: str) -> Array:
    """The scales widened to float32, all of them positive numbers."""
    scales = stored.float().numpy()
    if not np.isfinite(scales).all() or (scales <= 0).any():
        raise QuantizationError("holds a scale that is zero, negative or not finite", where=where, way_out=AGAIN)
    return scales


def packed_words(words: Array, bits: int, count: int, where: str) -> Array:
    """uint8 [R, ceil(count*bits/8)], the codes of QuantizedTensor, of int32 [R, W] with 2, 4 or 8 bits to an element.

    Low bits first in both, so the bytes are the words' own, and stay mapped where the words are.

    Raises QuantizationError where bits are set beyond the last element.
    """
    raw = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    width, used = ceil(count * bits, 8), count * bits % 8
    if raw[:, width:].any() or (used and (raw[:, width - 1] >> np.uint8(used)).any()):
        _refuse_spare(count, where)
    return np.ascontiguousarray(raw[:, :width])


def unpack_words(words: Array, bits: int, count: int, where: str) -> Array:
    """uint8 [R, count] of int32 [R, W]: element i of a row is at bit i*bits of the row's words, low bits first.

    Raises QuantizationError where bits are set beyond the last element.
    """
    raw = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits in (2, 4, 8):
        fields = np.stack([(raw >> np.uint8(shift)) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
        fields = fields.reshape(raw.shape[0], -1)
        codes, spare = fields[:, :count], fields[:, count:]
    else:
        stream = np.unpackbits(raw, axis=1, bitorder="little")
        used, spare = stream[:, : count * bits].reshape(raw.shape[0], count, bits), stream[:, count * bits :]
        codes = np.packbits(used, axis=2, bitorder="little")[..., 0]
    if spare.any():
        _refuse_spare(count, where)
    return np.ascontiguousarray(codes)


def _refuse_spare(count: int, where: str) -> NoReturn:
    raise QuantizationError(
        f"bits beyond column {count} are set", where=where, way_out=f"The packed width is wrong. {AGAIN}"
    )


def unsigned(signed: Array, bits: int, where: str) -> Array:
    """int8 values of ``bits`` bits -> codes, 2**(bits-1) more; raises QuantizationError for values outside."""
    offset = 1 << (bits - 1)
    if signed.size and (signed.min() < -offset or signed.max() >= offset):
        raise QuantizationError(
            f"holds values outside {bits} bits", where=where, way_out=f"Correct the stated bits. {AGAIN}"
        )
    return np.ascontiguousarray(signed).view(np.uint8) + np.uint8(offset)


def act_order(index: Array, group: int, where: str) -> Array | None:
    """g_idx [K], the group of every input feature -> ``order`` of QuantizedTensor, None where it is the natural one.

    A stable sort by group: within a group, features stay in ascending order.

    Raises QuantizationError for groups that are out of range or not of ``group`` features each (the last may be short).
    """
    columns = index.shape[0]
    groups = ceil(columns, group)
    low, high = (int(index.min()), int(index.max())) if columns else (0, 0)
    if low < 0 or high >= groups:
        raise QuantizationError(f"holds group {high} (lowest {low}), there are {groups}", where=where, way_out=AGAIN)
    counts = np.bincount(index, minlength=groups)
    if (counts[:-1] != group).any():
        at = int(np.flatnonzero(counts[:-1] != group)[0])
        raise QuantizationError(
            f"puts {counts[at]} features into group {at}, group_size is {group}", where=where, way_out=AGAIN
        )
    order = np.argsort(index, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(columns)) else order
