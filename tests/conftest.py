"""Fixtures that every part of the tests shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import refusals
from tools.error_catalogue import write_refusals

MakeStudent = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of tools/error_catalogue.py."""
    parser.addoption("--refusals", type=Path, help="write what tests/refusals.py catches to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Hands the option over."""
    refusals.making = config.getoption("--refusals")


def pytest_sessionfinish() -> None:
    """Writes the file."""
    if refusals.making is not None:
        write_refusals(refusals.making, refusals.REFUSALS)


@pytest.fixture(scope="session")
def make_tiny_student(tmp_path_factory: pytest.TempPathFactory) -> MakeStudent:
    """`make_tiny_student(variant="int4", model_type="llama", **options) -> Path`, written once per set of options.

    Shared by all tests of a run: copy the folder before changing anything in it.
    """
    from tools.tiny_student import write_tiny_student

    made: dict[tuple[tuple[str, object], ...], Path] = {}

    def make(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = write_tiny_student(tmp_path_factory.mktemp("student") / "tiny", **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_student(make_tiny_student: MakeStudent) -> Path:
    """The int4 llama package; read only."""
    return make_tiny_student()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_student: Path, make_tiny_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle built from the int4 student for this machine, with its float twin's logits; copy before changing it."""
    from device_profiles import load_profile
    from exporters.build import Request, build

    output = tmp_path_factory.mktemp("bundle") / "tiny"
    request = Request(
        load_profile("host"),
        tiny_student,
        make_tiny_student(variant="float"),
        output,
        ("onnx",),
        bench=False,
        allow_failed=True,
    )
    return build(request)[0].folder


@pytest.fixture(scope="session")
def orin_bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TensorRT artifacts of the int4 student for a Jetson AGX Orin; copy before changing it."""
    from device_profiles import load_profile
    from exporters.build import Request, build

    output = tmp_path_factory.mktemp("orin") / "tiny"
    request = Request(
        load_profile("jetson-orin"), tiny_student, None, output, ("tensorrt",), bench=False, allow_failed=True
    )
    return build(request)[0].folder
