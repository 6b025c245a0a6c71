"""The language model of a tiny student, exported to every ONNX form once per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from device_profiles import load_profile
from exporters.backends import Job
from exporters.families.decoder_lm import capture_lm
from exporters.onnx_ import OnnxExporter
from exporters.program import Program
from exporters.student import Student, load_student
from runtimes.bundle import Artifact
from tests.conftest import MakeStudent

CAPACITY = 128


@dataclass(frozen=True)
class ExportedLm:
    """artifacts: (form, mode) -> artifact, with files below ``folder``; all that must not be changed."""

    student: Student
    program: Program
    folder: Path
    artifacts: Mapping[tuple[str, str], Artifact]


ExportLm = Callable[[str], ExportedLm]


def export_lm(student: Student, folder: Path) -> ExportedLm:
    program = capture_lm(student, CAPACITY)
    exporter = OnnxExporter()
    written = exporter.export(Job(program, load_profile("host"), folder, exporter.forms(program)))
    return ExportedLm(student, program, folder, {(a.form, a.mode): a for a in written})


@pytest.fixture(scope="session")
def exported_lm(make_tiny_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory) -> ExportLm:
    """`exported_lm("int4")`; read only."""
    made: dict[str, ExportedLm] = {}

    def make(variant: str) -> ExportedLm:
        if variant not in made:
            student = load_student(make_tiny_student(variant=variant))
            made[variant] = export_lm(student, tmp_path_factory.mktemp(f"lm-{variant}"))
        return made[variant]

    return make
