"""libedge_kernels by ctypes: what the tests of its logic call."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporters.cuda_kernels import SOURCES
from tools.cuda_kernels import SANITIZE, WARNINGS, Launch

PROBE = Path(__file__).parent / "probe" / "plugin_fields.cpp"
UNITS = tuple(SOURCES / "library" / f"{name}.cpp" for name in ("driver", "edge_kernels", "ops", "table"))
TYPES = ("f32", "f16", "i8", "i32")  # in the order of their numbers
REFUSED, NO_DRIVER, NO_KERNELS, CUDA, BROKEN = range(1, 6)


class CTensor(ctypes.Structure):
    """EdgeTensor."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


class CAttribute(ctypes.Structure):
    """EdgeAttribute."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_double))


Spec = tuple[str, Sequence[int]]  # a type and a shape
Argument = tuple[int, int]  # a tensor's number, inputs then outputs, or -1 and 32 bits
Field = tuple[str, str, float]  # name, letter of the kind (ops.h), value


def build(folder: Path, *, compiler: str = "g++", units: Sequence[Path] = (*UNITS, PROBE)) -> Path:
    """The library, with the probe, for this machine or the compiler's; with EDGE_SANITIZE, under sanitizers."""
    library = folder / f"libedge_kernels_{compiler}.so"
    sanitize = SANITIZE if os.environ.get("EDGE_SANITIZE") else ()
    command = [compiler, "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", *WARNINGS, *sanitize]
    subprocess.run([*command, f"-I{SOURCES}", *map(str, units), "-o", str(library), "-ldl"], check=True)
    return library


class Refused(Exception):
    """A call's code and message."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class Library:
    """One function a method; failures raise Refused."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name in ("edge_message", "edge_op", "edge_build", "probe_message"):
            getattr(self.c, name).restype = ctypes.c_char_p

    def ops(self) -> list[str]:
        names, i = [], 0
        while (name := self.c.edge_op(i)) is not None:
            names.append(name.decode())
            i += 1
        return names

    def outputs(self, op: str, attributes: Mapping[str, float], inputs: Sequence[Spec]) -> list[Spec]:
        made, count = (CTensor * 16)(), ctypes.c_int()
        self._check(self.c.edge_outputs(*_given(op, attributes, inputs), made, ctypes.byref(count)))
        return [(TYPES[tensor.type], tuple(tensor.dims[: tensor.rank])) for tensor in made[: count.value]]

    def plan(
        self, op: str, attributes: Mapping[str, float], inputs: Sequence[Spec], sms: int, workspace: bool = False
    ) -> list[Launch]:
        made, count = (Launch * 4)(), ctypes.c_int()
        self._check(self.c.edge_plan(*_given(op, attributes, inputs), sms, workspace, made, ctypes.byref(count)))
        return list(made[: count.value])

    def workspace(self, op: str, attributes: Mapping[str, float], inputs: Sequence[Spec]) -> int:
        bytes_ = ctypes.c_uint64()
        self._check(self.c.edge_workspace(*_given(op, attributes, inputs), ctypes.byref(bytes_)))
        return bytes_.value

    def arguments(
        self, op: str, attributes: Mapping[str, float], inputs: Sequence[Spec], sms: int, workspace: bool = False
    ) -> list[Argument]:
        """Of the launch, in the kernel's order; ``attributes`` in the op's."""
        tensors, bits = (ctypes.c_int * 32)(), (ctypes.c_int32 * 32)()
        count = self.c.probe_arguments(*_given(op, attributes, inputs), sms, workspace, tensors, bits)
        if count < 0:
            raise Refused(REFUSED, self.c.probe_message().decode())
        return list(zip(tensors[:count], bits[:count], strict=True))

    def run(self, op: str, attributes: Mapping[str, float], inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        given = (CTensor * len(outputs))(*map(_tensor, outputs))
        self._check(self.c.edge_run(*_given(op, attributes, inputs), given, len(outputs), None, None))

    def set_kernels(self, path: Path) -> None:
        self._check(self.c.edge_set_kernels(os.fsencode(path)))

    def read_fields(self, op: str, fields: Sequence[Field], count: int, *, stored: bool) -> list[float]:
        """``count`` attributes in the op's order."""
        values = (ctypes.c_double * 16)()
        names = (ctypes.c_char_p * len(fields))(*(name.encode() for name, _, _ in fields))
        kinds = "".join(kind for _, kind, _ in fields).encode()
        given = (ctypes.c_double * len(fields))(*(value for _, _, value in fields))
        if self.c.probe_read(op.encode(), len(fields), names, kinds, given, int(stored), values):
            raise Refused(REFUSED, self.c.probe_message().decode())
        return list(values[:count])

    def round_trip(self, op: str, attributes: Sequence[float]) -> list[float]:
        values = (ctypes.c_double * 16)()
        given = (ctypes.c_double * len(attributes))(*attributes)
        if self.c.probe_store(op.encode(), given, len(attributes), values):
            raise Refused(REFUSED, self.c.probe_message().decode())
        return list(values[: len(attributes)])

    def _check(self, code: int) -> None:
        if code:
            raise Refused(code, self.c.edge_message().decode())


def _tensor(spec: Spec) -> CTensor:
    kind, shape = spec
    number = TYPES.index(kind) if kind in TYPES else 7
    return CTensor(number, len(shape), (ctypes.c_int64 * 8)(*shape[:8]), None)


def _given(op: str, attributes: Mapping[str, float], inputs: Sequence[Spec]) -> tuple[object, ...]:
    pairs = (CAttribute * len(attributes))(*((name.encode(), value) for name, value in attributes.items()))
    return op.encode(), pairs, len(attributes), (CTensor * len(inputs))(*map(_tensor, inputs)), len(inputs)
