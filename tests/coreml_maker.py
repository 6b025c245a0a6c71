"""The tiny student as Core ML packages inside a bundle, made once per run for every test that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from device_profiles import load_profile
from exporters.about import about
from exporters.backends import Job
from exporters.calibration import calibration_feeds
from exporters.coreml_ import CoreMlExporter
from exporters.families import capture_student
from exporters.golden import write_codec
from exporters.program import Program
from exporters.student import Student, load_student
from runtimes.bundle import Artifact, Bundle, write_manifest
from tests.bundle_maker import manifest

CAPACITY = 40
PROFILE = load_profile("iphone-16-pro")
BOTH = (("mlprogram", "fp16"), ("mlprogram", "exact"))
#: component -> the kinds that are made of it
KINDS = {"lm": BOTH, "image_decoder": (*BOTH, ("palettised", "fp16"))}


@dataclass(frozen=True)
class Exported:
    """artifacts: (component, mode) -> artifact of the bundle, and that of palettised weights; nothing of it may be
    changed."""

    student: Student
    programs: Mapping[str, Program]
    bundle: Bundle
    artifacts: Mapping[tuple[str, str], Artifact]
    palettised: Artifact

    @property
    def folder(self) -> Path:
        return self.bundle.folder

    def package(self, component: str, mode: str) -> Path:
        return (self.folder / self.artifacts[component, mode].model).parent


@cache
def exported(package: Path) -> Exported:
    """Language model and image decoder of a package, with the decoder's golden file."""
    student = load_student(package)
    programs = {program.entry: program for program in capture_student(student, CAPACITY)}
    folder = Path(mkdtemp(prefix="coreml-bundle-"))
    artifacts = [a for entry, kinds in KINDS.items() for a in export(student, programs[entry], folder, kinds)]
    (folder / "golden").mkdir()
    (folder / "golden" / "lm.safetensors").write_bytes(b"none")
    decoder = {"image_decoder": programs["image_decoder"]}
    written, _ = write_codec(student, "image", decoder, folder / "golden")
    fields = manifest(
        artifacts=json.loads(json.dumps([{k: v for k, v in asdict(a).items() if k != "raw"} for a in artifacts])),
        context=CAPACITY,
        special={"bos": 0, "eos": [1], "pad": None},
        vocab_size=student.config["vocab_size"],
        modalities={
            "text": {"tokens": [0, 1]},
            "image": {
                "tokens": [1, 1 + student.modalities["image"].codebook_size],
                "codebooks": 1,
                "codebook_size": student.modalities["image"].codebook_size,
                "grid": list(student.modalities["image"].grid),
                "begin": 0,
                "end": 0,
                "preprocessing": student.modalities["image"].preprocessing,
            },
        },
        golden={"lm": "golden/lm.safetensors"} | {name: f"golden/{file}" for name, file in written.items()},
    )
    bundle = write_manifest(folder, fields)
    [palettised] = (a for a in bundle.artifacts if a.form == "palettised")
    plain = {(a.component, a.mode): a for a in bundle.artifacts if a is not palettised}
    return Exported(student, programs, bundle, plain, palettised)


def export(student: Student, program: Program, folder: Path, kinds: Sequence[tuple[str, str]]) -> list[Artifact]:
    """One program in some kinds, the first of them preferred."""
    job = Job(
        program, PROFILE, folder, kinds, lambda: calibration_feeds(student, program), about=about(student, CAPACITY)
    )
    first, *others = CoreMlExporter().export(job)
    return [replace(first, preferred=True), *others]
