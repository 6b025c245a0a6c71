"""Packages that were damaged: every one ends in a typed error that names the file, whatever the bytes are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporters import coreml_package as package
from runtimes.coreml_format import BrokenPackage, WrongSpecification, load_package
from runtimes.coreml_interpreter import Function
from runtimes.errors import Fault
from runtimes.session import open_session
from tests.conftest import MakeStudent
from tests.coreml_maker import exported
from tests.refusals import raises

MODEL, WEIGHTS = f"Data/{package.MODEL}", f"Data/{package.WEIGHTS}/weight.bin"


@pytest.fixture
def copy(make_tiny_student: MakeStudent, tmp_path: Path) -> Path:
    """The image decoder's package, to be damaged."""
    package.copy(exported(make_tiny_student()).package("image_decoder", "fp16"), tmp_path / "copy.mlpackage")
    return tmp_path / "copy.mlpackage"


def version(number: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        spec = package.read(path)
        spec.specificationVersion = number
        (path / MODEL).write_bytes(spec.SerializeToString())

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return damage


def replaced(name: str, data: bytes, at: int = 0) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        held = bytearray((path / name).read_bytes())
        held[at : at + len(data)] = data
        (path / name).write_bytes(held)

    return damage


def manifest(path_inside: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        entry = {"itemInfoEntries": {"a": {"path": path_inside}}, "rootModelIdentifier": "a"}
        (path / "Manifest.json").write_text(json.dumps(entry))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], type[Fault], str]] = {
    "older": (version(8), WrongSpecification, r"version 8, this runtime knows 9"),
    "newer": (version(10), WrongSpecification, r"version 10, this runtime knows 9"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), BrokenPackage, r"weight\.bin: is missing"),
    "empty weights": (cut(WEIGHTS, 0), BrokenPackage, r"weight\.bin: is missing"),
    "half the weights": (cut(WEIGHTS, 0.5), BrokenPackage, r"weight\.bin: .*constant"),
    "weights of another version": (replaced(WEIGHTS, b"\x09", 4), BrokenPackage, r"storage version 9"),
    "a constant without its mark": (replaced(WEIGHTS, b"\0", 64), BrokenPackage, r"the constant at 64 is not"),
    "half a program": (cut(MODEL, 0.5), BrokenPackage, r"model\.mlmodel: is not a Core ML program"),
    "no program": (cut(MODEL, 0), WrongSpecification, r"version 0"),
    "a program of zeros": (replaced(MODEL, b"\0" * 64), BrokenPackage, r"model\.mlmodel: is not a Core ML program"),
    "no manifest": (lambda path: (path / "Manifest.json").unlink(), BrokenPackage, r"Manifest\.json: cannot be read"),
    "a manifest of noise": (replaced("Manifest.json", b"\xff\xfe"), BrokenPackage, r"Manifest\.json: names no model"),
    "a path that leaves": (manifest("../../model.mlmodel"), BrokenPackage, r"not inside the package"),
    "an absolute path": (manifest("/etc/passwd"), BrokenPackage, r"not inside the package"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_packages(copy: Path, name: str) -> None:
    damage, kind, message = DAMAGES[name]
    damage(copy)
    with raises(kind, match=message):
        load_package(copy)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (None, "names no function for '1'"),
        ({"4": "prefill_4"}, "names no function for '1'"),
        ({"1": 7}, "names no function for '1'"),
        ({"1": "decode", "many": "prefill_4"}, "not by lengths"),
        ({"1": "decode", "8": "prefill_8"}, "lacks the functions prefill_8"),
    ],
    ids=str,
)
def test_functions_of_the_manifest_that_cannot_be_run(make_tiny_student: MakeStudent, functions, message) -> None:
    held = exported(make_tiny_student())
    artifact = held.artifacts["lm", "exact"]
    with raises(BrokenPackage, match=message):
        open_session(held.bundle, replace(artifact, options={**artifact.options, "functions": functions}))


def test_any_changed_byte_of_the_program_is_a_typed_error_or_a_program(copy: Path) -> None:
    random, whole = np.random.default_rng(0), (copy / MODEL).read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(256)
        (copy / MODEL).write_bytes(data)
        try:
            for program in load_package(copy).values():
                Function(program, {})
        except Fault as error:
            assert error.where and error.what
