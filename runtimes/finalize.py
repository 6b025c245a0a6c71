"""Finishes a bundle on its device: builds the engines of its TensorRT artifacts, proves them, and times them.

    python -m runtimes.finalize BUNDLE

Every file is held against its hash first. Then the device against the profile: GPU, TensorRT, driver, system. Engines
that are there and right are kept, so that a second run builds nothing. Nothing of the device's state is changed; where
power mode or clocks are not the profile's, nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runtimes import engines
from runtimes.bench import bench, check_budgets
from runtimes.bundle import Artifact, Bundle, BundleBusy
from runtimes.cli import exit_code, open_bundle, positive
from runtimes.cuda_driver import Driver
from runtimes.engines import Machine, WrongEngine
from runtimes.engines_build import build_engine, build_with_trtexec, find_trtexec
from runtimes.errors import Fault
from runtimes.gates import INHERITANCE, LOSS
from runtimes.host import environment
from runtimes.jetson import why_not_timed
from runtimes.measure import USUAL
from runtimes.nvidia_smi import gpu_state
from runtimes.output import check_writable
from runtimes.parity import COMPILED, Selection, check
from runtimes.report import REPORT_JSON, Report, Result, print_report, read_report, write_report
from runtimes.session import BackendUnavailable
from runtimes.signing import TRUST_VARIABLE
from runtimes.tensorrt_engine import load_module, machine_with, released, this_machine

BACKEND = "tensorrt"
#: Builds one artifact's engine: its bytes, and how its plugins came.
Build = Callable[[Artifact], tuple[bytes, str]]


class WrongDevice(Fault):
    """This machine is not what the profile is for: an engine built here would not be the profile's."""


def check_device(profile: Mapping[str, Any], machine: Machine) -> None:
    """Holds the machine against the profile.

    Raises:
        WrongDevice: naming what differs, what was expected, and what is here.
    """
    profile = {key: str(profile.get(key) or "") for key in _NEEDED} | {"cuda_version": profile.get("cuda_version")}
    title, version = machine.compiler.rsplit(" ", 1)
    wanted_title = "TensorRT-RTX" if profile["tensorrt_version"].startswith("TensorRT-RTX") else "TensorRT"
    expected, wanted_cuda = re.sub(r"^\D+", "", profile["tensorrt_version"]), profile["cuda_version"]
    system, another = f"{profile['os']} {profile['arch']}", "Build a bundle for this device's profile"
    install = f"Install {wanted_title} {expected}"
    rows = (
        ("sm", profile["sm"], machine.sm, machine.sm == profile["sm"], another),
        ("runtime", wanted_title, title, title == wanted_title, install),
        (title, expected, version, _release(version) == _release(expected), install),
        ("system", system, machine.system, machine.system == system, another),
        ("CUDA of the driver", f"{wanted_cuda} or newer", machine.cuda,
         wanted_cuda is None or _release(machine.cuda) >= _release(str(wanted_cuda)), "Update the driver"),
    )  # fmt: skip
    for what, wanted, found, fits, way_out in rows:
        if not fits:
            text = f"{what} is {found}, the profile has {wanted or 'none'}"
            raise WrongDevice(text, f"profile {profile['name']}", way_out)


_NEEDED = ("name", "sm", "tensorrt_version", "os", "arch")


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def ensure_engines(bundle: Bundle, chosen: Sequence[Artifact], machine: Machine, build: Build) -> list[Fault]:
    """Builds each engine that is missing or not of this machine and bundle, and says what it did.

    Returns:
        Why engines are missing still: one that cannot be built does not keep the others from being built.

    Raises:
        BundleError: the disk refuses.
    """
    for name in engines.discard_foreign(bundle):
        print(f"{name}: removed: not written by this machine, or not beside an engine that is here")
    faults: list[Fault] = []
    built = 0
    for artifact in chosen:
        label = f"{artifact.component} ({artifact.label})"
        try:
            engines.check(bundle, artifact, machine)
            print(f"{label}: the engine is there")
            continue
        except WrongEngine as error:
            if "engine" in artifact.options:  # it came with the bundle: nothing here can make another
                faults.append(error)
                continue
            if engines.held(bundle, artifact):
                print(f"{label}: to be built again: {error.what}")
        try:
            engine, packaging = build(artifact)
        except Fault as error:
            faults.append(error)
            continue
        engines.store(bundle, artifact, engine, machine, packaging)
        built += 1
        print(f"{label}: built, {len(engine) / 1e6:.1f} MB")
    if not built and not faults:
        print("nothing to build")
    return faults


def with_identity(results: Sequence[Result], machine: Machine) -> list[Result]:
    """Rows of what ran on the engines, with the device that they ran on; files that were parsed elsewhere, or not at
    all, were parsed here when an engine was built of them."""
    where = f"on {identity(machine)}"
    ran = {row.key[:4] for row in results if row.status in ("passed", "failed") and _measured(row)}
    rows = []
    for row in results:
        if row.key[:4] in ran and _measured(row) and row.status in ("passed", "failed"):
            row = replace(row, where=f"{row.where}; {where}")
        elif row.key[:4] in ran and (row.gate, row.metric) == (COMPILED, "parsed"):
            row = replace(row, value=1.0, status="passed", where=f"by {machine.compiler} {where}")
        rows.append(row)
    return rows


def _measured(row: Result) -> bool:
    return row.backend == BACKEND and row.gate not in (COMPILED, INHERITANCE, LOSS)


def identity(machine: Machine) -> str:
    """The device in one line."""
    return f"{machine.gpu}, {machine.sm}, {machine.compiler}, driver for CUDA {machine.cuda}, {machine.system}"


def finalize(bundle: Bundle, options: argparse.Namespace) -> int:
    """Builds what is missing, checks and times; returns the exit status."""
    chosen = [a for a in bundle.artifacts if a.backend == BACKEND and options.component in (None, a.component)]
    if not chosen:
        raise Fault("has no artifact of TensorRT to finish", str(bundle.folder), "Run runtimes.parity instead")
    driver = Driver()
    try:
        machine, build = _compiler(bundle, chosen, driver, options)
        check_device(bundle.profile, machine)
        faults = ensure_engines(bundle, chosen, machine, build)
    finally:
        driver.close()
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    # A stand-in says so in its rows; beside that, what runs on the device itself is no proxy.
    selection = Selection(options.component, BACKEND, on_device=True)
    report = read_report(bundle.folder)
    results = with_identity(check(bundle, selection), machine)
    report = report.merged(results=results, environment={**environment(), **_device(machine)})
    write_report(bundle.folder, report)
    print_report(Report(results=tuple(results)))
    _time(bundle, selection, machine, report, options.no_bench)
    return 1 if faults or any(row.status == "failed" for row in results) else 0


def _time(bundle: Bundle, selection: Selection, machine: Machine, report: Report, no_bench: bool) -> None:
    reason = "asked for with --no-bench" if no_bench else why_not_timed(bundle.profile)
    if reason:
        print(f"not timed: {reason}")
        return
    rows, measured_on = bench(bundle, selection, USUAL)
    rows = [replace(row, where=f"{row.where}; on {identity(machine)}") for row in rows]
    budgets = [row for row in check_budgets(bundle, rows) if row.backend == BACKEND]
    here = {**measured_on, **_device(machine)}
    write_report(bundle.folder, report.merged(results=budgets, latency=rows, environment=here))
    print_report(Report(results=tuple(budgets), latency=tuple(rows)))


def _device(machine: Machine) -> dict[str, Any]:
    """The report's entry on the device, with what a discrete GPU says of its clocks and power now."""
    return {"device": {**asdict(machine), "state": gpu_state(machine.uuid)}}


def _compiler(
    bundle: Bundle, chosen: Sequence[Artifact], driver: Driver, options: argparse.Namespace
) -> tuple[Machine, Build]:
    """This machine with its TensorRT, and how that builds: by its Python package, else by trtexec where it is given."""
    try:
        tensorrt = load_module(chosen[0])
    except BackendUnavailable:
        if options.trtexec is None:
            raise
        tool, version = find_trtexec(options.trtexec)
        machine = machine_with(driver, released(version))
        return machine, lambda artifact: build_with_trtexec(bundle, artifact, tool, options.workspace_mib)
    return this_machine(driver, tensorrt), lambda a: build_engine(bundle, a, tensorrt, options.workspace_mib)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the bundle against a second run. Raises BundleBusy; what is no folder is left to whoever opens it."""
    if os.name == "nt" or not folder.is_dir():
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleBusy("is being finished by another process", str(folder), "Wait until it ends.") from error
        yield
    finally:
        os.close(descriptor)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m runtimes.finalize",
        description="Builds, proves and times a bundle's engines on its device.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trust = f"take bundles signed by this key alone, or by one of the *.pub in a folder (default: ${TRUST_VARIABLE})"
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that exporters.build made")
    parser.add_argument("--trust", type=Path, metavar="KEY.pub", help=trust)
    parser.add_argument("--component", metavar="NAME", help="one component, such as lm (default: all)")
    parser.add_argument("--workspace-mib", type=positive, metavar="N", help="memory that TensorRT may try kernels with")
    parser.add_argument("--trtexec", type=Path, metavar="PATH", help="build with it where TensorRT's Python is missing")
    parser.add_argument("--no-bench", action="store_true", help="do not measure latency")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Checks every hash, then finishes."""
    with alone(options.bundle):
        engines.sweep(options.bundle)
        bundle = open_bundle(options.bundle, options.trust)
        check_writable(bundle.folder / REPORT_JSON)
        return finalize(bundle, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
