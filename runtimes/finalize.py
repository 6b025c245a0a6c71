"""Finishes a bundle on its device: builds the engines of its TensorRT artifacts, proves them, and times them.

    python -m runtimes.finalize BUNDLE

Every file is held against its hash first. Then the device against the profile: GPU, TensorRT, driver, system. Engines
that are there and right are kept, so that a second run builds nothing. Nothing of the device's state is changed; where
power mode or clocks are not the profile's, nothing is timed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes import engines
from runtimes.bench import bench_and_report
from runtimes.bundle import Artifact, Bundle
from runtimes.cli import bundle_parser, exit_code, open_bundle, positive
from runtimes.cuda_driver import Driver
from runtimes.engines import Machine, WrongEngine
from runtimes.engines_build import build_engine, build_with_trtexec
from runtimes.errors import Fault
from runtimes.jetson import why_not_timed
from runtimes.output import check_writable
from runtimes.parity import Selection, check_and_report
from runtimes.report import REPORT_JSON, Report, print_report, read_report, write_report
from runtimes.session import BackendUnavailable
from runtimes.tensorrt_engine import load_module, this_machine

BACKEND = "tensorrt"


class WrongDevice(Fault):
    """This machine is not what the profile is for: an engine built here would not be the profile's."""


def check_device(profile: Mapping[str, Any], machine: Machine) -> None:
    """Holds the machine against the profile.

    Raises:
        WrongDevice: naming what differs, what was expected, and what is here.
    """
    version = machine.compiler.split()[-1]
    expected = re.sub(r"^\D+", "", profile["tensorrt_version"] or "")
    wanted_cuda = profile["cuda_version"]
    system = f"{profile['os']} {profile['arch']}"
    rows = (
        ("sm", profile["sm"], machine.sm, machine.sm == profile["sm"], "Build a bundle for this device's profile"),
        ("TensorRT", expected, version, _release(version) == _release(expected), f"Install TensorRT {expected}"),
        ("system", system, machine.system, machine.system == system, "Build a bundle for this device's profile"),
        ("CUDA of the driver", f"{wanted_cuda} or newer", machine.cuda,
         wanted_cuda is None or _release(machine.cuda) >= _release(wanted_cuda), "Update the driver"),
    )  # fmt: skip
    for what, wanted, found, fits, way_out in rows:
        if not fits:
            raise WrongDevice(f"{what} is {found}, the profile has {wanted}", f"profile {profile['name']}", way_out)


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def finalize(bundle: Bundle, options: argparse.Namespace) -> int:
    """Builds what is missing, checks and times; returns the exit status."""
    chosen = [a for a in bundle.artifacts if a.backend == BACKEND and options.component in (None, a.component)]
    if not chosen:
        raise Fault("has no artifact of TensorRT to finish", str(bundle.folder), "Run runtimes.parity instead")
    driver = Driver()
    try:
        machine = _build_missing(bundle, chosen, driver, options)
    finally:
        driver.close()
    # A stand-in's rows give way to what the engines did: on the device itself, nothing is a proxy.
    results = check_and_report(bundle, Selection(options.component, BACKEND, on_device=True))
    report = read_report(bundle.folder)
    where = f"on {machine.gpu}, {machine.sm}, {machine.compiler}, driver for CUDA {machine.cuda}"
    write_report(bundle.folder, report.merged(environment={"engines": where}))
    print_report(Report(results=tuple(results)))
    reason = "asked for with --no-bench" if options.no_bench else why_not_timed(bundle.profile)
    if reason:
        print(f"not timed: {reason}")
    else:
        selection = Selection(options.component, BACKEND, on_device=True)
        print_report(Report(latency=tuple(bench_and_report(bundle, selection))))
    return 1 if any(row.status == "failed" for row in results) else 0


def _build_missing(bundle: Bundle, chosen: Sequence[Artifact], driver: Driver, options: argparse.Namespace) -> Machine:
    try:
        tensorrt = load_module(chosen[0])
    except BackendUnavailable:
        if options.trtexec is None:
            raise
        check_device(bundle.profile, machine := build_with_trtexec(bundle, chosen, driver, options.trtexec))
        return machine
    machine = this_machine(driver, tensorrt)
    check_device(bundle.profile, machine)
    for artifact in chosen:
        label = f"{artifact.component} ({artifact.label})"
        if "engine" in artifact.options:
            print(f"{label}: its engine came with the bundle")
            continue
        try:
            engines.check(bundle, artifact, machine)
            print(f"{label}: the engine is there")
        except WrongEngine as error:
            if engines.held(bundle, artifact):
                print(f"{label}: built again: {error.what}")
            engine, packaging = build_engine(bundle, artifact, tensorrt, options.workspace_mib)
            engines.store(bundle, artifact, engine, machine, packaging)
            print(f"{label}: built, {len(engine) / 1e6:.1f} MB")
    return machine


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = bundle_parser("finalize", "Builds, proves and times a bundle's engines on its device.", __doc__ or "")
    parser.add_argument("--component", metavar="NAME", help="one component, such as lm (default: all)")
    parser.add_argument("--workspace-mib", type=positive, metavar="N", help="memory that TensorRT may try kernels with")
    parser.add_argument("--trtexec", type=Path, metavar="PATH", help="build with it where TensorRT's Python is missing")
    parser.add_argument("--no-bench", action="store_true", help="do not measure latency")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Checks every hash, then finishes."""
    bundle = open_bundle(options.bundle, options.trust)
    check_writable(bundle.folder / REPORT_JSON)
    return finalize(bundle, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
