"""What the header of a safetensors file says of a torchao tensor: its class, its attributes and its parts.

Source: torchao 0.18 (prototype/safetensors). ``metadata["MODULE.weight"]`` is JSON {"_type": class, "_data":
attributes, "_tensor_data_names": parts}; a part is stored as MODULE._weight_PART. Values that are not plain are
themselves {"_type", "_data"}: dtypes, enumerations, granularities and the options of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from exporters.errors import QuantizationError
from exporters.formats.compressed_activations import Rounded
from exporters.formats.scheme import Shape, ceil
from exporters.strict_json import parse_json

PREFIX = "_weight_"


@dataclass(frozen=True)
class Described:
    """One quantised tensor.

    Attributes:
        dtype: of its qdata in the file.
        where: names the entry of the header.
    """

    kind: str
    data: Mapping[str, Any]
    parts: frozenset[str]
    dtype: str
    where: str

    def refuse(self, what: str, way_out: str) -> NoReturn:
        """Raises QuantizationError at this entry."""
        raise QuantizationError(what, where=self.where, way_out=way_out)

    def value(self, key: str) -> Any:
        """The attribute, without the name of its class: "int4" of {"_type": "torch.dtype", "_data": "int4"}."""
        return plain(self.data.get(key))

    def block(self) -> tuple[int, int]:
        """block_size, rows and columns that share a scale."""
        found = self.data.get("block_size")
        if not isinstance(found, list) or len(found) != 2 or not all(type(side) is int and side > 0 for side in found):
            self.refuse(f"block_size is {found!r:.80}", "Quantise linear layers per row, in groups or in blocks")
        return found[0], found[1]


def plain(value: Any) -> Any:
    """The data of {"_type", "_data"}, or the value itself."""
    return value["_data"] if isinstance(value, dict) and value.keys() == {"_type", "_data"} else value


def described(text: str, dtype: str, where: str) -> Described:
    """Parses an entry. Raises ConfigError or QuantizationError."""
    value = parse_json(text.encode(), where)
    kind, data = (value.get("_type"), value.get("_data")) if isinstance(value, dict) else (None, None)
    parts = value.get("_tensor_data_names") if isinstance(value, dict) else None
    if not isinstance(kind, str) or not isinstance(data, dict) or not isinstance(parts, list):
        raise QuantizationError(f"is {text!r:.100}", where=where, way_out="Save the checkpoint again with torchao 0.18")
    return Described(kind, data, frozenset(part for part in parts if isinstance(part, str)), dtype, where)


class Blocked(Rounded):
    """A scheme whose weights have one scale for each block of rows and columns."""

    block: tuple[int, int]

    def check(self, module: str, shape: Shape) -> None:
        """Refuse blocks that do not divide the weight; torchao makes none."""
        super().check(module, shape)
        if shape[0] % self.block[0] or shape[1] % self.block[1]:
            raise QuantizationError(
                f"block_size {list(self.block)} does not divide {list(shape)}",
                where=f"{module}.weight",
                way_out="Take the header and the weights from one checkpoint",
            )

    def _grid(self, shape: Shape) -> tuple[int, int]:
        return ceil(shape[0], self.block[0]), ceil(shape[1], self.block[1])
