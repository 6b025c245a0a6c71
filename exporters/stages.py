"""The stages of a build, each a function from what the last one gave to what the next one takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from device_profiles.schema import Profile
from exporters import contents, golden, inheritance
from exporters.about import about
from exporters.backends import Job, load_exporter
from exporters.calibration import calibration_feeds
from exporters.errors import ExportError
from exporters.families import capture_student
from exporters.inheritance import Inheritance
from exporters.kv_cache import cache_steps
from exporters.model_config import standard_names
from exporters.noise import PRECISIONS, Floor
from exporters.plan import Entry, Forecast, check_fit, forecast, plan_entries
from exporters.program import Program
from exporters.progress import Progress, begin, folder_bytes
from exporters.quantise import Quantised, quantise
from exporters.quantise.calibration import Calibration, load_calibration
from exporters.student import Student, load_student
from runtimes.bundle import Artifact, Bundle, write_manifest

#: What a student and its float twin have in common.
TWIN_KEYS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Planned:
    """A student with its captured programs and, for each component, what will be made of it.

    Attributes:
        quantised: what the build made of a float student, where it was asked to; ``student`` is its result then and
            ``floating`` the student that came.
    """

    student: Student
    floating: Student | None
    profile: Profile
    programs: Mapping[str, Program]
    entries: Mapping[str, tuple[Entry, ...]]
    capacity: int
    forecast: Forecast
    quantised: Quantised | None = None


@dataclass(frozen=True)
class Asked:
    """What a build is asked to quantise, beside what the profile says.

    Attributes:
        scratch: a folder for the matrices, which must stay until the build is done.
        calibration: a folder of data; None takes the package's own samples.
        insist: the user asks, not the profile alone: a student that is quantised already is refused.
        fit: False rounds to nearest whatever the method, for a plan that needs sizes alone.
    """

    scratch: Path
    calibration: Path | None = None
    insist: bool = False
    fit: bool = True


def plan(
    package: Path,
    floating: Path | None,
    profile: Profile,
    backends: Iterable[str] | None,
    context: int | None,
    progress: Progress,
    asked: Asked | None = None,
) -> Planned:
    """Loads the student, quantises it where that is asked for, captures it, and decides what to make.

    Args:
        asked: None quantises nothing, whatever the profile says.

    Raises:
        ExportError: a student, profile or context that does not work, before anything was spent on it.
    """
    # Every file is hashed, and its weights are read for their checks.
    student = load_student(package, begin(progress, "load", 2 * folder_bytes(package)))
    twin = None if floating is None else _twin(student, load_student(floating))
    calibration = None if asked is None else _calibration(student, profile, asked)
    quantised = _quantised(student, profile, asked, calibration, progress)
    if quantised is not None:
        student, twin = quantised.student, student
    capacity = _capacity(student, profile, context)
    programs = {}
    steps = None
    if asked is not None and profile.quantise.kv_cache is not None:
        progress("fit the int8 cache", 0)
        steps = cache_steps(student, calibration, capacity)
    for program in capture_student(student, capacity, steps):
        progress(f"capture {program.entry}", 0)
        programs[program.entry] = program
    entries = {name: plan_entries(profile, program, backends) for name, program in programs.items()}
    logits = golden.SAMPLES * golden.STEPS * student.config["vocab_size"] * 4 * (1 if twin is None else 2)
    forms = {name: {(e.backend, e.form) for e in found if not e.left_out} for name, found in entries.items()}
    prediction = forecast(profile, programs.values(), min(logits, 2 * golden.LARGEST_LOGITS), forms)
    check_fit(profile, prediction)
    return Planned(student, twin, profile, programs, entries, capacity, prediction, quantised)


def _calibration(student: Student, profile: Profile, asked: Asked) -> Calibration | None:
    """Data for what the profile has quantised, if it has; None where there are none."""
    settings = profile.quantise
    if settings.kv_cache is None and (settings.method is None or student.quantized or not asked.fit):
        return None
    return load_calibration(student, asked.calibration)


def _quantised(
    student: Student, profile: Profile, asked: Asked | None, calibration: Calibration | None, progress: Progress
) -> Quantised | None:
    """The student as the profile wants it quantised; None for one that stays as it came."""
    settings = profile.quantise
    if asked is None or settings.method is None or (student.quantized and not asked.insist):
        return None
    if not asked.fit:
        settings = replace(settings, method="round-to-nearest", mean_kl=None)
        return quantise(student, settings, None, asked.scratch, progress)
    return quantise(student, settings, calibration, asked.scratch, progress)


def _twin(student: Student, floating: Student) -> Student:
    """The float package, if it is the same student before quantisation: one architecture and one tokenizer."""
    if not student.quantized:
        raise ExportError(
            "the student is a float one itself", where="--float-package", way_out="Leave that option out."
        )
    if floating.quantized:
        raise ExportError(
            "is quantised itself",
            where=f"--float-package {floating.folder}",
            way_out="Name the float student that this one was quantised from.",
        )
    theirs, ours = standard_names(floating.config), standard_names(student.config)
    for key in TWIN_KEYS:
        if theirs.get(key) != ours.get(key):
            raise ExportError(
                f"has {key} {theirs.get(key)}, the student {ours.get(key)}",
                where=f"--float-package {floating.folder}",
                way_out="Name the float twin of this student.",
            )
    if _tokenizer(floating) != _tokenizer(student):
        raise ExportError(
            "has another tokenizer than the student",
            where=f"--float-package {floating.folder}",
            way_out="Name the float twin of this student.",
        )
    return floating


def _tokenizer(student: Student) -> bytes | None:
    return None if student.tokenizer is None else student.tokenizer.read_bytes()


def _capacity(student: Student, profile: Profile, context: int | None) -> int:
    longest = student.config.get("max_position_embeddings", profile.max_context)
    if context is not None and context > longest:
        raise ExportError(
            f"{context} tokens are more than the student's {longest}", where="--context", way_out="Ask for fewer."
        )
    if context is not None and context > profile.max_context:
        raise ExportError(
            f"{context} tokens are more than the {profile.max_context} of profile {profile.name}",
            where="--context",
            way_out="Ask for fewer.",
        )
    capacity = min(longest, context or profile.max_context)
    smallest = golden.STEPS + golden.SHORTEST_PROMPT
    if capacity < smallest:
        raise ExportError(
            f"{capacity} positions are too few for the {golden.STEPS} steps of the parity gate",
            where="context",
            way_out=f"At least {smallest} are needed.",
        )
    return capacity


def export(planned: Planned, folder: Path, progress: Progress) -> tuple[Artifact, ...]:
    """Writes every planned artifact; the first one of each component is the preferred one."""
    artifacts: list[Artifact] = []
    for component, entries in planned.entries.items():
        made = [entry for entry in entries if not entry.left_out]
        written = {}
        for backend in dict.fromkeys(entry.backend for entry in made):
            weights = sum(constant.nbytes for constant in planned.programs[component].constants.values())
            job = Job(
                planned.programs[component],
                planned.profile,
                folder,
                [(entry.form, entry.mode) for entry in made if entry.backend == backend],
                lambda component=component: calibration_feeds(planned.student, planned.programs[component]),
                begin(progress, f"export {component} for {backend}", weights),
                about(planned.student, planned.capacity),
            )
            written |= {artifact.label: artifact for artifact in load_exporter(backend).export(job)}
        artifacts += [replace(written[entry.label], preferred=entry is made[0]) for entry in made]
    for backend in dict.fromkeys(artifact.backend for artifact in artifacts):
        progress(f"finish {backend}", 0)
        own = [artifact for artifact in artifacts if artifact.backend == backend]
        load_exporter(backend).finish(planned.profile, own, folder)
    return tuple(artifacts)


def read_back(planned: Planned, artifacts: Iterable[Artifact], folder: Path, progress: Progress) -> Inheritance:
    """Compares the codes, scales and zero points in every written artifact with the student's."""
    total = Inheritance()
    for artifact in artifacts:
        program = planned.programs[artifact.component]
        if program.inherited:
            read = begin(progress, f"read back {artifact.component} {artifact.label}", inheritance.size(program))
            stored = load_exporter(artifact.backend).read_matrices(folder, artifact, program)
            total += inheritance.compare(artifact.label, program, stored, planned.student.quantized, read)
    return total


def write_golden(planned: Planned, folder: Path, progress: Progress) -> tuple[dict[str, str], float, list[Floor]]:
    """Writes the golden files; returns component -> path in the bundle, the float32 reference's relative noise, and
    the noise floors of the other dtypes that artifacts compute in."""
    precisions = {
        name: sorted({each for entry in entries if not entry.left_out for each in PRECISIONS[entry.mode]})
        for name, entries in planned.entries.items()
    }
    progress("golden outputs of lm", 0)
    paths = {"lm": "golden/lm.safetensors"}
    noise, floors = golden.write_lm(
        planned.student, planned.floating, planned.capacity, folder / paths["lm"], precisions["lm"]
    )
    for name, modality in planned.student.modalities.items():
        if modality.discretizer is None:
            continue
        progress(f"golden outputs of {name}", 0)
        own = {entry: program for entry, program in planned.programs.items() if entry.startswith(f"{name}_")}
        written, found = golden.write_codec(planned.student, name, own, folder / "golden", precisions)
        paths |= {component: f"golden/{file}" for component, file in written.items()}
        floors += found
    return paths, noise, floors


def finish(
    planned: Planned,
    key: str,
    artifacts: tuple[Artifact, ...],
    golden_files: dict[str, str],
    noise: float,
    floors: Iterable[Floor],
    inherited: Inheritance,
    folder: Path,
    progress: Progress,
) -> Bundle:
    """Adds the rest of the contents, checks that the package is still what was read, and writes the manifest last."""
    profile = planned.profile
    backends = dict.fromkeys(artifact.backend for artifact in artifacts)
    tokenizer = contents.write_contents(planned.student, profile, backends, folder)
    widths = [matrix.bits for matrix in planned.programs["lm"].inherited.values()]
    limits = contents.tolerances(profile, planned.programs, noise, floors)
    limits += contents.loss_tolerances(profile, min(widths, default=None))
    planned.student.verify_unchanged()
    return write_manifest(
        folder,
        contents.manifest(
            planned.student,
            profile,
            key,
            planned.capacity,
            tokenizer,
            artifacts,
            golden_files,
            limits,
            inherited,
            planned.quantised,
            datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        progress,
    )
