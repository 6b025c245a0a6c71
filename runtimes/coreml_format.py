"""Reads an ``.mlpackage`` as it was written: the program in model.mlmodel and the constants in weight.bin.

Numpy and the standard library alone, so that a saved package can be checked where Core ML is not. Sources of the
formats: the Protocol Buffers wire format (https://protobuf.dev/programming-guides/encoding), Model.proto and MIL.proto
of coremltools (mlmodel/format), and its MILBlob/Blob/StorageFormat.hpp. Nothing in a file is believed: whatever does
not fit raises BrokenPackage.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from runtimes.errors import Fault

Array = np.ndarray[Any, Any]

#: The one specification that this interpreter knows: iOS 18, macOS 15 and their siblings.
SPECIFICATION, RELEASE = 9, "iOS 18"

AGAIN = "Fetch or make the bundle again."


class BrokenPackage(Fault):
    """A package whose files do not hold together."""


class WrongSpecification(Fault):
    """A package written for another generation of Core ML."""


# --- the wire format ----------------------------------------------------------------------------------------------

#: message -> field number -> (name, kind); a kind is a message, "map:<message>", or how a scalar is read. Every field
#: but the scalars marked with "=" may repeat.
SCHEMA: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "Model": {1: ("version", "=int"), 2: ("description", "Description"), 502: ("program", "Program")},
    "Description": {1: ("input", "Feature"), 10: ("output", "Feature"), 13: ("state", "Feature"),
                    20: ("functions", "FunctionDescription"), 21: ("default", "=str")},
    "FunctionDescription": {1: ("name", "=str"), 2: ("input", "Feature"), 3: ("output", "Feature"),
                            6: ("state", "Feature")},
    "Feature": {1: ("name", "=str")},
    "Program": {2: ("functions", "map:Function")},
    "Function": {1: ("inputs", "Named"), 2: ("opset", "=str"), 3: ("blocks", "map:Block")},
    "Block": {2: ("outputs", "str"), 3: ("operations", "Operation")},
    "Operation": {1: ("type", "=str"), 2: ("inputs", "map:Argument"), 3: ("outputs", "Named"), 4: ("blocks", "Block"),
                  5: ("attributes", "map:Value")},
    "Argument": {1: ("bindings", "Binding")},
    "Binding": {1: ("name", "=str"), 2: ("value", "Value")},
    "Named": {1: ("name", "=str"), 2: ("type", "Type")},
    "Type": {1: ("tensor", "TensorType"), 2: ("list", "ListType"), 5: ("state", "StateType")},
    "ListType": {},
    "StateType": {1: ("wrapped", "Type")},
    "TensorType": {1: ("dtype", "=int"), 2: ("rank", "=int"), 3: ("dimensions", "Dimension")},
    "Dimension": {1: ("constant", "Constant"), 2: ("unknown", "Unknown")},
    "Constant": {1: ("size", "=int")},
    "Unknown": {},
    "Value": {2: ("type", "Type"), 3: ("immediate", "Immediate"), 5: ("blob", "Blob")},
    "Blob": {1: ("file", "=str"), 2: ("offset", "=int")},
    "Immediate": {1: ("tensor", "Tensor"), 3: ("list", "List")},
    "List": {1: ("values", "Value")},
    "Tensor": {1: ("floats", "Floats"), 2: ("ints", "Ints"), 3: ("bools", "Ints"), 4: ("strings", "Strings"),
               5: ("longs", "Ints"), 7: ("bytes", "Bytes")},
    "Floats": {1: ("values", "float")},
    "Ints": {1: ("values", "int")},
    "Strings": {1: ("values", "str")},
    "Bytes": {1: ("values", "bytes")},
    "Entry": {1: ("key", "=str")},
}  # fmt: skip

_DEPTH = 40


def decode(message: str, data: bytes | memoryview, depth: int = 0) -> dict[str, Any]:
    """A message as a dict: lists of what may repeat, dicts of maps, plain values. Unknown fields are skipped.

    Raises ValueError for what is no such message.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    schema = SCHEMA[message]
    out: dict[str, Any] = {}
    for number, wire, value in _fields(memoryview(data)):
        if number not in schema:
            continue
        name, kind = schema[number]
        if kind.startswith("map:"):
            key, item = "", b""
            for part, _, content in _fields(_view(value)):
                key, item = (str(content, "utf-8"), item) if part == 1 else (key, content)
            out.setdefault(name, {})[key] = decode(kind[4:], _view(item), depth + 1)
        elif kind.startswith("="):
            out[name] = _scalar(kind[1:], wire, value)[-1]
        elif kind in SCHEMA:
            out.setdefault(name, []).append(decode(kind, _view(value), depth + 1))
        else:
            out.setdefault(name, []).extend(_scalar(kind, wire, value))
    return out


def _view(value: Any) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return memoryview(value)


def _scalar(kind: str, wire: int, value: Any) -> list[Any]:
    """The values of one occurrence of a field: several where numbers are packed."""
    if kind in ("str", "bytes"):
        held = bytes(_view(value))
        return [held.decode("utf-8") if kind == "str" else held]
    if kind == "float":
        data = _view(value)
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    numbers = [value] if wire == 0 else list(_varints(_view(value)))
    return [n - (1 << 64) if n >> 63 else n for n in numbers]  # int32 and int64 alike: two's complement in 64 bits


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, integer or bytes) of each field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, wire, value
            continue
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = _varint(data, at)
        elif wire not in (1, 5):
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field reaches past the end")
        yield tag >> 3, wire, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("a number of more than 64 bits")


# --- constants ----------------------------------------------------------------------------------------------------

#: MIL.proto DataType -> (name, bits)
TYPES: Mapping[int, tuple[str, int]] = {
    1: ("bool", 8), 2: ("string", 0), 10: ("float16", 16), 11: ("float32", 32), 21: ("int8", 8), 22: ("int16", 16),
    23: ("int32", 32), 24: ("int64", 64), 25: ("int4", 4), 31: ("uint8", 8), 32: ("uint16", 16), 33: ("uint32", 32),
    35: ("uint4", 4), 36: ("uint2", 2), 37: ("uint1", 1), 38: ("uint6", 6), 39: ("uint3", 3),
}  # fmt: skip
#: StorageFormat.hpp BlobDataType -> name
BLOB_TYPES: Mapping[int, str] = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
_SENTINEL, _RECORD = 0xDEADBEEF, struct.Struct("<IIQQ")
_BLOB_VERSION = 2


class Weights:
    """weight.bin; each constant is read once, however many functions share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[tuple[int, str, tuple[int, ...]], Array] = {}
        try:
            self._data = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
        except OSError as error:
            raise BrokenPackage(f"cannot be read: {error.strerror}", str(path), AGAIN) from error
        self._checked = False

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The constant whose record is at ``offset``, unpacked. Raises BrokenPackage."""
        key = offset, dtype, shape
        if key not in self._held:
            self._held[key] = self._unpack(offset, dtype, shape)
        return self._held[key]

    def _unpack(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        self._check_header()
        if offset % 64 or offset + _RECORD.size > len(self._data):
            raise self._wrong(f"no constant at {offset} of {len(self._data)} bytes")
        sentinel, kind, size, start = _RECORD.unpack(self._data[offset : offset + _RECORD.size].tobytes())
        if sentinel != _SENTINEL or BLOB_TYPES.get(kind) != dtype:
            raise self._wrong(f"the constant at {offset} is not {dtype}")
        bits = next(width for name, width in TYPES.values() if name == dtype)
        wanted = -(-math.prod(shape) * bits // 8)
        if size != wanted or start + size > len(self._data):
            raise self._wrong(f"the constant at {offset} has {size} bytes at {start}, wanted {wanted}")
        return unpack(self._data[start : start + size], dtype, bits, shape)

    def _check_header(self) -> None:
        if self._checked:
            return
        if len(self._data) < 64:
            raise self._wrong("is missing" if not len(self._data) else "ends before its header")
        version = int(self._data[4:8].view("<u4")[0])
        if version != _BLOB_VERSION:
            raise self._wrong(f"is of storage version {version}, this reader knows {_BLOB_VERSION}")
        self._checked = True

    def _wrong(self, what: str) -> BrokenPackage:
        return BrokenPackage(what, str(self._path), AGAIN)


def unpack(data: Array, dtype: str, bits: int, shape: tuple[int, ...]) -> Array:
    """Bytes to values; those of less than a byte follow one another from the lowest bit on."""
    if bits >= 8:
        return data.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
    count = math.prod(shape)
    planes = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    values = (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if dtype.startswith("int"):
        return ((values ^ (1 << bits - 1)).astype(np.int8) - np.int8(1 << bits - 1)).reshape(shape)
    return values.reshape(shape)


# --- programs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One operation. An argument is the name of a value, a list of names, or a constant.

    `outputs` are (name, dtype) pairs; `constant` holds the value of a ``const``.
    """

    type: str
    arguments: Mapping[str, Any]
    outputs: tuple[tuple[str, str], ...]
    constant: Any = None


@dataclass(frozen=True)
class Name:
    """Refers to another value of the function."""

    name: str


@dataclass(frozen=True)
class Program:
    """One function: its inputs with their dtypes, its states with dtype and shape, and its operations in order."""

    name: str
    inputs: Mapping[str, str]
    states: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


def load_package(folder: Path) -> Mapping[str, Program]:
    """The functions of a package by name.

    Raises:
        WrongSpecification: naming the version in the file and the one known.
        BrokenPackage: a missing, truncated or contradictory file, by name.
    """
    root = _root(folder)
    try:
        model = decode("Model", root.read_bytes())
        version = model.get("version", 0)
        if version != SPECIFICATION:
            raise WrongSpecification(
                f"is of specification version {version}, this runtime knows {SPECIFICATION} ({RELEASE})",
                str(root),
                f"Build the bundle again for {RELEASE}.",
            )
        weights = Weights(root.parent / "weights" / "weight.bin")
        functions = model["program"][-1]["functions"]
        return {name: _program(name, function, weights) for name, function in functions.items()}
    except OSError as error:
        raise BrokenPackage(f"cannot be read: {error.strerror}", str(root), AGAIN) from error
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise BrokenPackage(f"is not a Core ML program: {error}", str(root), AGAIN) from error


def stored(programs: Iterable[Program]) -> dict[str, str]:
    """What a reader of the numbers must know of how the weights are stored: that tables of clusters stand for them."""
    for program in programs:
        operations = program.operations
        # A table below scales is that of an encoding (fp8, fp4, nf4), which the student's own codes stand for.
        scaled = {
            operation.arguments["data"].name
            for operation in operations
            if operation.type == "constexpr_blockwise_shift_scale" and isinstance(operation.arguments["data"], Name)
        }
        if any(o.type == "constexpr_lut_to_dense" and o.outputs[0][0] not in scaled for o in operations):
            return {"weights": "palettised, a re-quantisation"}
    return {}


def _root(folder: Path) -> Path:
    """Path of model.mlmodel, which the package's Manifest.json names."""
    where = folder / "Manifest.json"
    try:
        manifest = json.loads(where.read_bytes())
        path = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        parts = PurePosixPath(path).parts
    except OSError as error:
        raise BrokenPackage(f"cannot be read: {error.strerror}", str(where), AGAIN) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenPackage(f"names no model: {error}", str(where), AGAIN) from error
    if not parts or ".." in parts or PurePosixPath(path).is_absolute():
        raise BrokenPackage(f"names {path!r}, which is not inside the package", str(where), AGAIN)
    return folder.joinpath("Data", *parts)


def _program(name: str, function: Mapping[str, Any], weights: Weights) -> Program:
    inputs, states = {}, {}
    for entry in function.get("inputs", ()):
        [kind] = entry["type"]
        if "state" in kind:
            states[entry["name"]] = _tensor_type(kind["state"][0]["wrapped"][0])
        else:
            inputs[entry["name"]] = _tensor_type(kind)[0]
    block = next(iter(function["blocks"].values()))
    operations = tuple(_operation(entry, weights) for entry in block.get("operations", ()))
    return Program(name, inputs, states, tuple(block.get("outputs", ())), operations)


def _operation(entry: Mapping[str, Any], weights: Weights) -> Operation:
    if entry.get("blocks"):
        raise ValueError(f"operation {entry['type']} holds blocks of its own")
    arguments = {key: _argument(value, weights) for key, value in entry.get("inputs", {}).items()}
    outputs = tuple((output["name"], _dtype(output["type"][0])) for output in entry.get("outputs", ()))
    held = entry.get("attributes", {}).get("val")
    return Operation(entry["type"], arguments, outputs, None if held is None else _value(held, weights))


def _argument(argument: Mapping[str, Any], weights: Weights) -> Any:
    values = [
        Name(binding["name"]) if "name" in binding else _value(binding["value"][0], weights)
        for binding in argument["bindings"]
    ]
    return values[0] if len(values) == 1 else values


def _dtype(kind: Mapping[str, Any]) -> str:
    return _tensor_type(kind)[0] if "tensor" in kind else "list"


def _tensor_type(kind: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """dtype and shape; a flexible dimension is -1."""
    [tensor] = kind["tensor"]
    sizes = tuple(
        dimension["constant"][0].get("size", 0) if "constant" in dimension else -1
        for dimension in tensor.get("dimensions", ())
    )
    return TYPES[tensor["dtype"]][0], sizes


def _value(value: Mapping[str, Any], weights: Weights) -> Any:
    """A constant: an array, a string or a list of constants."""
    [kind] = value["type"]
    if "list" in kind:
        return [_value(item, weights) for item in value["immediate"][0]["list"][0].get("values", ())]
    dtype, shape = _tensor_type(kind)
    if "blob" in value:
        return weights.read(value["blob"][0].get("offset", 0), dtype, shape)
    [tensor] = value["immediate"][0]["tensor"]
    [content] = next(iter(tensor.values()))
    held = content.get("values", [])
    if dtype == "string":
        return held[0] if held else ""
    if "bytes" in tensor:
        bits = next(width for name, width in TYPES.values() if name == dtype)
        return unpack(np.frombuffer(b"".join(held), np.uint8), dtype, bits, shape)
    return np.array(held, dtype).reshape(shape)
