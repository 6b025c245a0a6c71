"""The tiny student as TensorRT artifacts, each made once per run for every test that reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx_ir as ir

from device_profiles import load_profile
from exporters.backends import Job, Kind
from exporters.calibration import calibration_feeds
from exporters.families import capture_student
from exporters.program import Program
from exporters.student import Student, load_student
from exporters.tensorrt_ import TensorRtExporter
from runtimes.bundle import Artifact, Bundle, FileInfo
from tests.bundle_maker import make_bundle

CAPACITY, VOCAB = 128, 136
#: Devices of the tests: TensorRT 10.3, and TensorRT-RTX.
JETSON, RTX = "jetson-orin", "rtx-4090"
TYPED, FUSED, INT8 = ("typed", "fp16"), ("fused", "fp16"), ("int8", "fp16")


@dataclass(frozen=True)
class Exported:
    """One artifact below ``folder``, which must not be changed: see `copied`."""

    student: Student
    program: Program
    artifact: Artifact
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / self.artifact.model

    @property
    def model(self) -> ir.Model:
        return ir.load(self.path)

    def copied(self, folder: Path) -> Exported:
        """The same artifact in another folder, free to be damaged."""
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)

    def bundle(self, scratch: Path) -> Bundle:
        """A bundle that lists the files; ``scratch`` is an empty place for the rest of it."""
        made = make_bundle(scratch / "bundle")
        sizes = {file: FileInfo((self.folder / file).stat().st_size, "") for file in self.artifact.files}
        return replace(
            made, folder=self.folder, files=sizes, artifacts=(self.artifact,), vocab_size=VOCAB, context=CAPACITY
        )


@cache
def student_of(package: Path) -> Student:
    return load_student(package)


@cache
def programs(package: Path) -> Mapping[str, Program]:
    """Every program of a package by its entry."""
    return {program.entry: program for program in capture_student(student_of(package), CAPACITY)}


def write(package: Path, entry: str, device: str, kinds: Sequence[Kind], folder: Path) -> tuple[Artifact, ...]:
    """Exports one program, calibrated with the student's own signals where a kind asks for it."""
    student, program = student_of(package), programs(package)[entry]
    job = Job(program, load_profile(device), folder, kinds, lambda: calibration_feeds(student, program))
    return TensorRtExporter().export(job)


@cache
def exported(package: Path, entry: str, device: str, kind: Kind) -> Exported:
    folder = Path(mkdtemp(prefix="tensorrt-"))
    [artifact] = write(package, entry, device, [kind], folder)
    return Exported(student_of(package), programs(package)[entry], artifact, folder)


def change(made: Exported, name: str, index: int, step: int = 1) -> None:
    """Adds to one byte of an initializer in the artifact's file of weights."""
    tensor = made.model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor), f"{name} is not in the file of weights"
    path = made.folder / made.artifact.files[1]
    data = np.fromfile(path, np.uint8)
    data[tensor.offset + index] += np.uint8(step)
    data.tofile(path)
