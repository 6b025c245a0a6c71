"""Packages on disk: functions joined into one with shared weights, written the same way every time, and read back."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.coreml_convert import quietly
from exporters.encodings import ENCODINGS, values
from exporters.inheritance import StoredMatrix
from exporters.ops.coreml import PREFIX, matrix_name
from exporters.program import Inherited

#: Where an ``.mlpackage`` keeps its two files.
MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
_DATA = "Data"
#: A value that is named neither after a node of the Program nor after a matrix, but by a counter.
_NUMBERED = re.compile(rf"(?!{PREFIX}|matrix_)(?P<stem>.+)_\d+")
#: Appended to a value's name by the vendor's passes.
_CASTS = re.compile(r"(_cast_[a-z]+\d+)+$")


def join(parts: Mapping[str, Path], path: Path) -> None:
    """Writes packages of one function each as one package with a function per name; the first is the default.

    Constants that several functions hold are stored once.
    """
    import coremltools as ct

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, part in parts.items():
        descriptor.add_function(str(part), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = next(iter(parts))
    with quietly():
        ct.utils.save_multifunction(descriptor, str(path))


def describe(path: Path, texts: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Adds descriptions and metadata to a package, and settles what the vendor writes differently each time.

    Args:
        texts: name of an input, output or state -> a sentence.
        metadata: "author", "license", "short_description", "version", and any key that an app is to read.
    """
    file = path / _DATA / MODEL
    spec = read(path)
    for function in spec.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = texts.get(feature.name, "")
    held = spec.description.metadata
    known = {"author": "author", "license": "license", "short_description": "shortDescription"}
    for key, value in sorted(metadata.items()):
        if key in known:
            setattr(held, known[key], value)
        elif key == "version":
            held.versionString = value
        else:
            held.userDefined[key] = value
    _renumber(spec)
    file.write_bytes(spec.SerializeToString(deterministic=True))
    for other in path.iterdir():  # the vendor leaves a map for its debugger there
        if other.is_file() and other.name != "Manifest.json":
            other.unlink()
    _write_manifest(path)


def _renumber(spec: Any) -> None:
    """Counts the values that the vendor named by a counter of the whole process from 0 in each function; operations
    are called after their first result."""
    for function in spec.mlProgram.functions.values():
        block = next(iter(function.block_specializations.values()))
        kept = {*block.outputs, *(feature.name for feature in function.inputs)}
        names = _settled([output.name for op in block.operations for output in op.outputs], kept)
        for op in block.operations:
            bindings = (binding for value in op.inputs.values() for binding in value.arguments)
            for held in (*op.outputs, *bindings):
                if held.name in names:
                    held.name = names[held.name]
            called = op.outputs[0].name if op.outputs else f"{op.inputs['data'].arguments[0].name}__{op.type}"
            if "name" in op.attributes:
                op.attributes["name"].immediateValue.tensor.strings.values[:] = [called]


def _settled(values: Iterable[str], kept: Set[str]) -> dict[str, str]:
    """Name by a counter -> the same counted within ``values``, without those that are ``kept``."""
    counts: Counter[str] = Counter()
    names = {}
    for value in values:
        numbered = _NUMBERED.fullmatch(value)
        if numbered is None or value in kept:
            continue
        stem = numbered["stem"]
        while (new := f"{stem}_{counts[stem]}") in kept:
            counts[stem] += 1
        counts[stem] += 1
        names[value] = new
    return names


def _write_manifest(path: Path) -> None:
    """Manifest.json with identifiers that follow from what they name; the vendor's are random."""
    entries = {}
    for item, text in ((MODEL, "CoreML Model Specification"), (WEIGHTS, "CoreML Model Weights")):
        identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, item)).upper()
        entries[identifier] = {
            "author": "com.apple.CoreML", "description": text, "name": item.rsplit("/", 1)[1], "path": item
        }  # fmt: skip
    root = next(iter(entries))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", "utf-8")


def files(path: Path) -> list[Path]:
    """Every file of a package, the one that Core ML opens first in front."""
    return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: (p.name != "Manifest.json", p))


def read(path: Path) -> Any:
    """The package's specification."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((path / _DATA / MODEL).read_bytes())
    return spec


def operations(spec: Any, function: str | None = None) -> Iterator[Any]:
    """The operations of every function, or of one."""
    for name, held in spec.mlProgram.functions.items():
        if function in (None, name):
            yield from next(iter(held.block_specializations.values())).operations


def histogram(spec: Any) -> dict[str, int]:
    """Operators of the default function, but for constants."""
    counts = Counter(op.type for op in operations(spec, spec.description.defaultFunctionName))
    del counts["const"]
    return dict(sorted(counts.items()))


def node_of(value: str) -> str | None:
    """What a value of the program is in the Program: "<node>" or "<node>__<n>"; None where it is neither."""
    bare = _CASTS.sub("", value)
    return bare.removeprefix(PREFIX) if bare.startswith(PREFIX) else None


def values_of_nodes(spec: Any, function: str) -> dict[str, tuple[str, int]]:
    """node_of(value) -> (value, its rank), for the last value that bears the name."""
    found = {}
    for op in operations(spec, function):
        for output in op.outputs if op.type != "const" else ():
            if (node := node_of(output.name)) is not None:
                found[node] = output.name, output.type.tensorType.rank
    return found


def copy(path: Path, target: Path) -> None:
    """A package, byte for byte."""
    shutil.copytree(path, target, copy_function=shutil.copyfile)


# --- reading matrices back ----------------------------------------------------------------------------------------


def read_matrices(path: Path, inherited: Mapping[str, Inherited]) -> dict[str, StoredMatrix]:
    """Prefix of the Program's constants -> the matrix in the package, by the vendor's own reader.

    A matrix that not every function holds the same way comes back with NaN scales, which equal nothing.
    """
    from coremltools.converters.mil.frontend.milproto import load as milproto

    spec = read(path)
    program = milproto.load(spec, spec.specificationVersion, str(path / _DATA / WEIGHTS))
    names = {matrix_name(prefix): prefix for prefix in inherited}
    found: dict[str, list[StoredMatrix]] = {}
    for function in program.functions.values():
        for op in function.operations:
            prefix = names.get(_CASTS.sub("", op.name))
            if op.op_type == "constexpr_blockwise_shift_scale" and prefix and op.outputs[0].child_ops:
                found.setdefault(prefix, []).append(_stored(op, inherited[prefix].bits))
    return {prefix: _agreed(held, len(program.functions)) for prefix, held in found.items()}


def _stored(op: Any, code_bits: int) -> StoredMatrix:
    """Signed codes are the unsigned ones less 2^(code_bits-1), with no zero points of their own; a code of 2 bits lies
    in a field of 4."""
    from coremltools.converters.mil.mil import types

    if op.data.op is not None and op.data.op.op_type == "constexpr_lut_to_dense":
        return _looked_up(op.data.op, np.asarray(op.scale.val))
    kind = types.builtin_to_string(op.data.dtype)
    bits = int(kind.removeprefix("u").removeprefix("int"))
    data, scales = (np.asarray(value.val) for value in (op.data, op.scale))
    rows = data.shape[0]
    codes, scales = data.reshape(rows, -1).astype(np.int16), scales.reshape(rows, -1).astype(np.float32)
    points = None
    if kind.startswith("int"):
        codes = codes + 2 ** (code_bits - 1)
        if code_bits != bits:
            points = np.full(scales.shape, 2 ** (code_bits - 1), np.uint8)
    elif op.offset is not None:
        points = np.asarray(op.offset.val).reshape(rows, -1).astype(np.uint8)
    else:
        points = np.zeros(scales.shape, np.uint8)
    block, order = codes.shape[1] // scales.shape[1], _order(op.outputs[0].child_ops[0])
    return StoredMatrix(codes.astype(np.uint8), scales, points, bits, block, order=order)


def _order(product: Any) -> np.ndarray | None:
    """Indices of the gather along the features that a product's input comes from, if it comes from one."""
    x = product.inputs["x"].op
    while x is not None and x.op_type in ("cast", "pad", "transpose", "expand_dims"):
        x = x.inputs["x"].op
    if x is None or x.op_type != "gather" or x.inputs["x"].val is not None or x.inputs["indices"].val is None:
        return None
    return np.asarray(x.inputs["indices"].val)


def _looked_up(op: Any, scale: np.ndarray) -> StoredMatrix:
    """Indices into a table, which is one of exporters/encodings.py up to what stands for codes that are no numbers."""
    indices, table = np.asarray(op.indices.val), np.asarray(op.lut.val).reshape(-1).astype(np.float32)
    rows = indices.shape[0]
    codes, scales = indices.reshape(rows, -1).astype(np.uint8), scale.reshape(rows, -1).astype(np.float32)
    wanted = {name: np.nan_to_num(values(name)) for name in ENCODINGS}
    same = [name for name, held in wanted.items() if np.array_equal(held, table)]
    bits, block = len(table).bit_length() - 1, codes.shape[1] // scales.shape[1]
    return StoredMatrix(codes, scales, None, bits, block, *same or ["unknown"])


def _agreed(held: list[StoredMatrix], functions: int) -> StoredMatrix:
    first = held[0]
    same = len(held) == functions and all(
        np.array_equal(first.codes, other.codes)
        and np.array_equal(first.scales, other.scales)
        and first.encoding == other.encoding
        and (first.zero_points is None) == (other.zero_points is None)
        and (first.zero_points is None or np.array_equal(first.zero_points, other.zero_points))
        and (first.order is None) == (other.order is None)
        and (first.order is None or np.array_equal(first.order, other.order))
        for other in held[1:]
    )
    if same:
        return first
    return replace(first, scales=first.scales * np.float32("nan"))
