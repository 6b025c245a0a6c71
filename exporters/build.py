"""Turns a delivery package into a verified bundle for a device.

    python -m exporters.build --profile host
    python -m exporters.build --profile jetson-orin --package my-student/ --output bundles/orin

The student is captured once, lowered to what each backend of the profile runs fastest, checked against PyTorch on
golden inputs, measured where this machine is the device, and published as one atomic folder. Without --package the
shipped reference student is built. A second build with nothing changed reuses the first.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from device_profiles import Profile, ProfileError, list_profiles, load_profile
from device_profiles.quantise import KV_CACHES, RECIPES
from exporters import console
from exporters.contents import build_key
from exporters.errors import ExportError
from exporters.heap import return_large_blocks
from exporters.package import validate
from exporters.progress import Progress, begin, folder_bytes
from exporters.reference import VARIANTS, assemble
from exporters.safe_files import hash_file
from runtimes.bench import BUDGET, USUAL, bench, check_budgets
from runtimes.bundle import Bundle, load_bundle, staged
from runtimes.errors import Fault
from runtimes.parity import LOSS, Selection, check
from runtimes.report import Matrix, Report, Result, print_report, read_report, write_report

if TYPE_CHECKING:
    from exporters.stages import Planned

DEFAULT_OUTPUT = Path("bundles")
#: Where a build keeps the matrices that it quantises, in the bundle's folder while that is made.
SCRATCH = ".quantised"


def quiet(stage: str, size: int) -> None:
    """The progress callback of a caller that wants none."""


@dataclass(frozen=True)
class Request:
    """One build.

    Attributes:
        package: folder of the student; floating: folder of its float twin, for the quantisation-loss gate.
        backends: those to make, or None for all that the profile names.
        context: KV capacity in tokens; None takes the smaller of the student's and the profile's.
        calibration: folder of data that a float student is quantised with; None takes the package's own samples.
        insist: the user asks for the quantisation, not the profile alone: a quantised student is refused.
        bench: measure latency, where this machine is the profile's device.
        allow_failed: publish although a gate failed; the report says which.
    """

    profile: Profile
    package: Path
    floating: Path | None
    output: Path
    backends: tuple[str, ...] | None = None
    context: int | None = None
    bench: bool = True
    allow_failed: bool = False
    allow_downgrade: bool = False
    calibration: Path | None = None
    insist: bool = False


class GateFailed(ExportError):
    """An artifact does not do what the student does; ``report`` holds every row."""

    def __init__(self, report: Report, output: Path) -> None:
        self.report = report
        failed = faults(report)
        first = failed[0]
        super().__init__(
            f"{len(failed)} of {len(report.results)} gates fail, the first: {first.gate} {first.metric} = "
            f"{first.value} against {first.limit} ({first.where})",
            where=f"{first.component} {first.backend}/{first.form}/{first.mode}",
            way_out=f"Nothing was published at {output}; --allow-failed publishes it with its report.",
        )


def build(request: Request, progress: Progress = quiet) -> tuple[Bundle, Report, bool]:
    """Builds, or finds built; returns the bundle, its report and whether it was reused.

    Args:
        progress: called with the name of each stage and with the bytes it writes.

    Raises:
        ExportError, ProfileError, Fault: what is wrong with the input, the device or the disk.
        GateFailed: a gate failed and nothing was published.
    """
    packages = [folder for folder in (request.package, request.floating) if folder is not None]
    checked = begin(progress, "check packages", sum(map(folder_bytes, packages)))
    key = _key(request, [validate(folder, checked).sha256 for folder in packages])
    if (reused := _reusable(request, key)) is not None:
        return reused, read_report(reused.folder), True
    with staged(request.output, allow_downgrade=request.allow_downgrade, progress=progress) as folder:
        bundle, quantisation = _make(request, key, folder, progress)
        gc.collect()  # the student's modules and mapped files, while every runtime opens its sessions
        report = replace(_measure(bundle, request, progress), quantisation=quantisation)
        write_report(folder, report)
        if faults(report) and not request.allow_failed:
            raise GateFailed(report, request.output)
    return load_bundle(request.output), report, False


def _make(request: Request, key: str, folder: Path, progress: Progress) -> tuple[Bundle, tuple[Matrix, ...]]:
    """Everything that is in the bundle but its report, and the matrices that the build quantised."""
    from exporters import stages  # torch and transformers load here: a reused build does without them

    scratch = folder / SCRATCH
    planned = _plan(request, scratch, progress)
    artifacts = stages.export(planned, folder, progress)
    inherited = stages.read_back(planned, artifacts, folder, progress)
    golden_files, noise, floors = stages.write_golden(planned, folder, progress)
    shutil.rmtree(scratch, ignore_errors=True)
    bundle = stages.finish(planned, key, artifacts, golden_files, noise, floors, inherited, folder, progress)
    return bundle, () if planned.quantised is None else planned.quantised.matrices


def _plan(request: Request, scratch: Path, progress: Progress, fit: bool = True) -> Planned:
    from exporters import stages

    asked = stages.Asked(scratch, request.calibration, request.insist, fit)
    return stages.plan(
        request.package, request.floating, request.profile, request.backends, request.context, progress, asked
    )


def faults(report: Report) -> tuple[Result, ...]:
    """The failed rows that are faults: quantisation loss and budgets are the student's and the device's, decisions."""
    return tuple(row for row in report.failed if row.gate not in (LOSS, BUDGET))


def _measure(bundle: Bundle, request: Request, progress: Progress) -> Report:
    """Parity of every artifact, and latency where this machine is the device of the profile."""
    selection = Selection().placed(bundle)
    progress("parity", 0)
    report = Report().merged(results=check(bundle, selection))
    if selection.stand_in is not None or not request.bench:
        return report.merged(results=check_budgets(bundle, ()))
    progress("latency", 0)
    rows, environment = bench(bundle, selection, USUAL)
    return report.merged(results=check_budgets(bundle, rows), latency=rows, environment=environment)


def _key(request: Request, packages: list[str]) -> str:
    options = {
        "backends": request.backends,
        "context": request.context,
        "bench": request.bench,
        "insist": request.insist,
        "calibration": _calibration_hashes(request.calibration),
    }
    return build_key(packages, request.profile, options)


def _calibration_hashes(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ExportError(
            "is not a folder", where=f"--calibration {folder}", way_out="Name one with .txt or .safetensors files."
        )
    return [hash_file(path).sha256 for path in sorted(folder.iterdir()) if path.is_file()]


def _reusable(request: Request, key: str) -> Bundle | None:
    """The bundle at the output, if it was made from the same input, is intact, and every gate held."""
    try:
        bundle = load_bundle(request.output)
        if bundle.build_key != key:
            return None
        bundle.verify()
        report = read_report(bundle.folder)
    except Fault:
        return None
    return bundle if report.results and not faults(report) else None


@contextmanager
def _students(options: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """(package, float package): the given ones, or the reference student unpacked for the time of the build."""
    if options.package is not None:
        yield options.package, options.float_package
        return
    with tempfile.TemporaryDirectory(prefix="reference-student-") as folder:
        variant = options.variant or VARIANTS[0]
        package = assemble(variant, Path(folder) / "student")
        floating = options.float_package
        if floating is None and variant != "float":
            floating = assemble("float", Path(folder) / "float")
        yield package, floating


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m exporters.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", metavar="NAME", help="the device; --list-profiles names them")
    add("--package", type=Path, metavar="DIR", help="delivery package or transformers checkpoint folder")
    add("--variant", choices=VARIANTS, help="of the reference student (int4)")
    add("--float-package", type=Path, metavar="DIR", help="the float student, to measure the quantisation loss against")
    add("--output", type=Path, metavar="DIR", help="the bundle's folder (bundles/PROFILE)")
    add("--backends", metavar="A,B", help="onnx,openvino,tvm,coreml,tensorrt (default: all that the profile names)")
    add("--context", type=int, metavar="TOKENS", help="KV capacity (default: what student and profile allow)")
    add("--quantise", choices=RECIPES, metavar="METHOD", help=f"quantise a float student: {', '.join(RECIPES)}")
    add("--calibration", type=Path, metavar="DIR", help="its .txt or .safetensors data (the package's own samples)")
    add("--group", type=int, metavar="COLUMNS", help="columns that share a scale (32 for int4, a row for int8)")
    add("--mean-kl", type=float, metavar="NATS", help="quality budget: matrices that cost too much are kept wider")
    add("--kv-cache", choices=KV_CACHES, help="keep keys and values in int8, fitted to the same data")
    add("--dry-run", action="store_true", help="predict sizes, memory and speed, check that they fit, and stop")
    add("--no-bench", action="store_true", help="do not measure latency")
    add("--allow-failed", action="store_true", help="publish although a gate failed")
    add("--allow-downgrade", action="store_true", help="replace a bundle of a newer version of the same student")
    add("--list-profiles", action="store_true", help="list the devices and stop")
    options = parser.parse_args(arguments)
    if not options.profile and not options.list_profiles:
        parser.error(f"--profile is required; there are: {', '.join(list_profiles())}")
    if options.package is not None and options.variant is not None:
        parser.error("--variant chooses among the reference student's, so it does not go with --package")
    if options.context is not None and options.context < 1:
        parser.error("--context must be at least 1")
    return options


def run_command(options: argparse.Namespace) -> int:
    """Runs the parsed command; returns the exit status."""
    if options.list_profiles:
        console.print_profiles([load_profile(name) for name in list_profiles()])
        return 0
    from exporters.plan import check_backends

    profile = _with_options(load_profile(options.profile), options)
    names = None if options.backends is None else [name.strip() for name in options.backends.split(",")]
    backends = None if names is None else check_backends(names)
    with _students(options) as (package, floating):
        request = Request(
            profile,
            package,
            floating,
            options.output or DEFAULT_OUTPUT / profile.name,
            backends,
            options.context,
            not options.no_bench,
            options.allow_failed,
            options.allow_downgrade,
            options.calibration,
            options.quantise is not None,
        )
        if options.dry_run:
            return _dry_run(request)
        with console.progress() as progress:
            bundle, report, reused = build(request, progress)
    console.print_summary(bundle, report, reused)
    return 1 if faults(report) else 0


def _with_options(profile: Profile, options: argparse.Namespace) -> Profile:
    """The profile with the options that go before its [quantise] table."""
    settings = profile.quantise
    given = [key for key in ("group", "mean_kl") if getattr(options, key) is not None]
    if given and options.quantise is None and settings.method is None:
        raise ExportError(
            f"is given without a method, and profile {profile.name} names none",
            where=f"--{given[0].replace('_', '-')}",
            way_out=f"Add --quantise with one of {', '.join(RECIPES)}.",
        )
    if options.quantise is not None:
        method, bits, activations = RECIPES[options.quantise]
        settings = replace(settings, method=method, bits=bits, activations=activations, group=None)
    for key in ("group", "mean_kl", "kv_cache"):
        if (value := getattr(options, key)) is not None:
            settings = replace(settings, **{key: value})
    for key, what, way_out in settings.problems():
        raise ExportError(what, where=f"--{key.replace('_', '-')}", way_out=way_out)
    return replace(profile, quantise=settings)


def _dry_run(request: Request) -> int:
    with console.progress() as progress, tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        planned = _plan(request, Path(scratch), progress, fit=False)
    entries = [entry for rows in planned.entries.values() for entry in rows]
    console.print_forecast(request.profile, planned.forecast, entries)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 built, 1 a gate failed, 2 refused with one message."""
    options = parse(arguments)
    return_large_blocks()
    # A terminated build cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command(options)
    except GateFailed as error:
        print_report(Report(error.report.failed))
        console.error(error)
        return 1
    except (ExportError, ProfileError, Fault) as error:
        console.error(error)
        return 2
    except OSError as error:  # a path that the system refuses, such as one below /proc
        console.error(
            ExportError(
                error.strerror or str(error), where=str(error.filename or options.output), way_out="Choose another path"
            )
        )
        return 2
    except KeyboardInterrupt:
        console.error("interrupted; nothing was published")
        return 130


if __name__ == "__main__":
    sys.exit(main())
