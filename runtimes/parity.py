"""The parity gates of a bundle, from the bundle alone: its golden inputs and reference outputs travel in it.

    python -m runtimes.parity BUNDLE [--backend NAME] [--mode exact|fast] [--component NAME]

Two gates that never merge: *export* holds an artifact against the same (quantised) student in PyTorch, and
*quantisation-loss* holds that student against the float one. Signals are checked for content before any metric.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtimes.bundle import Artifact, Bundle
from runtimes.cli import bundle_parser, exit_code, open_bundle
from runtimes.compare import Found, compare_decoder, compare_encoder, compare_lm, compare_loss
from runtimes.errors import Fault
from runtimes.gates import INHERITANCE, LOSS, Limit, export_gate, export_limits, is_quantised, judge, loss_limits
from runtimes.golden import GoldenError, load_lm
from runtimes.host import environment
from runtimes.identity import stand_in
from runtimes.output import check_writable
from runtimes.report import REPORT_JSON, Report, Result, Status, print_report, read_report, write_report
from runtimes.session import BackendUnavailable, open_session


@dataclass(frozen=True)
class Selection:
    """Which artifacts to check, None meaning all. `stand_in` names this machine when it is not the profile's device:
    what passes on it counts as `proxy`. It is found out (runtimes/identity.py) unless given, or ruled out by
    `on_device`."""

    component: str | None = None
    backend: str | None = None
    form: str | None = None
    mode: str | None = None
    threads: int | None = None
    stand_in: str | None = None
    on_device: bool = False

    def holds(self, artifact: Artifact) -> bool:
        names = ("component", "backend", "form", "mode")
        return all(getattr(self, name) in (None, getattr(artifact, name)) for name in names)

    def placed(self, bundle: Bundle) -> Selection:
        """The selection with `stand_in` settled for this machine."""
        if self.on_device or self.stand_in is not None:
            return self
        return replace(self, stand_in=stand_in(bundle.profile))


ALL = Selection()
#: The gate of a compiler on the build machine, and what its own word for the outcome is as a status.
COMPILED = "compiled"
_COMPILED: Mapping[str, Status] = {
    "built": "passed",
    "proxy": "proxy",
    "parsed": "proxy",
    "pending-device": "pending-device",
}


def check(bundle: Bundle, selection: Selection = ALL) -> list[Result]:
    """Runs every gate of the selected artifacts. Raises Fault when nothing is selected."""
    chosen = [artifact for artifact in bundle.artifacts if selection.holds(artifact)]
    if not chosen:
        held = ", ".join(f"{a.component} {a.label}" for a in bundle.artifacts) or "no artifact"
        raise Fault("no artifact matches", str(bundle.folder), f"This bundle holds: {held}")
    placed = selection.placed(bundle)
    rows = [row for artifact in chosen for row in check_artifact(bundle, artifact, placed)]
    rows += [row for artifact in chosen for row in check_compiled(artifact)]
    for artifact in chosen:
        if artifact.component == "lm" and artifact.preferred:
            rows += [*check_inheritance(bundle, artifact), *check_loss(bundle, artifact)]
    return rows


def check_artifact(bundle: Bundle, artifact: Artifact, selection: Selection = ALL) -> list[Result]:
    """The export gate of one artifact. Its faults fail the rows; a backend that is not here leaves them pending."""
    gate, machine, note = export_gate(artifact), selection.stand_in, ""
    compare = {"lm": compare_lm, "decoder": compare_decoder, "encoder": compare_encoder}
    found: Mapping[str, Found] | None = None
    try:
        with open_session(bundle, artifact, selection.threads) as session:
            gate, machine = export_gate(artifact, session.effective), session.stand_in or selection.stand_in
            note = ", ".join(f"{key} {value}" for key, value in session.effective.items())
            found = compare[artifact.component.split("_")[-1]](bundle, session)
    except BackendUnavailable as error:
        limits = export_limits(bundle, artifact, gate)
        rows = _rows(artifact, gate, limits, dict.fromkeys(limits, Found(None, str(error))))
        return [replace(row, status="pending-device") for row in rows]
    except Fault as error:
        reason = str(error)
    limits = export_limits(bundle, artifact, gate)
    if found is None:
        found = dict.fromkeys(limits, Found(None, reason))
    if note:
        found = {metric: replace(each, where=f"{each.where}; computed in {note}") for metric, each in found.items()}
    return _rows(artifact, gate, limits, found, machine)


def check_loss(bundle: Bundle, artifact: Artifact) -> list[Result]:
    """The quantisation-loss gate, overall and per modality: both sides are PyTorch, so it is the student's, not the
    artifact's. No rows when the bundle carries no float logits (a float student has nothing to lose)."""
    reference = replace(artifact, backend="torch", form="reference", mode="exact")
    limits = loss_limits(bundle, artifact)
    try:
        golden = load_lm(bundle)
    except GoldenError as error:
        return _rows(reference, LOSS, limits, dict.fromkeys(limits, Found(None, str(error))))
    if golden.float_logits is None:
        return []
    rows = []
    for name, found in compare_loss(bundle, golden).items():
        suffix = f"/{name}" if name else ""
        rows += _rows(reference, LOSS, {m + suffix: limit for m, limit in limits.items()}, found)
    return rows


def check_inheritance(bundle: Bundle, artifact: Artifact) -> list[Result]:
    """What the exporter read back from its own files: N of N tensors with identical codes, scales and zero points."""
    identical, total = (int(bundle.inheritance.get(key, 0)) for key in ("identical", "total"))
    if not total and not is_quantised(artifact):
        return []
    mismatches = ", ".join(map(str, bundle.inheritance.get("mismatches", ())))
    where = f"{identical} of {total} tensors identical" + (f"; differing: {mismatches}" if mismatches else "")
    limit = Limit(float(max(total, 1)), "every quantised tensor, at least one")
    return [judge(artifact, INHERITANCE, "identical", float(identical), limit, where, None)]


def check_compiled(artifact: Artifact) -> list[Result]:
    """What the build machine's compiler made of an artifact that a device builds its engine from: parsed or not, how
    many layers, and what of each pattern is in one layer. No rows for other artifacts."""
    found = artifact.options.get("compiled")
    if found is None:
        return []
    try:
        return _compiled_rows(artifact, found)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        where = f"{artifact.component} ({artifact.label}): options.compiled"
        raise Fault(f"is not what a build writes ({error!r:.200})", where, "Build the bundle again.") from error


def _compiled_rows(artifact: Artifact, found: Mapping[str, Any]) -> list[Result]:
    def row(metric: str, value: float | None, where: str) -> Result:
        status: Status = _COMPILED[found["status"]]
        names = artifact.component, artifact.backend, artifact.form, artifact.mode
        return Result(*names, COMPILED, metric, value, None, "", status, where)

    by = found["compiler"]
    if "layers" not in found:
        return [row("parsed", 1.0 if found["status"] == "parsed" else None, f"by {by}")]
    by = f"{by} for {found['capability']}"
    if found["status"] == "proxy":
        by += f", which stands in for {artifact.options['sm']}"
    rows = [row("layers", float(found["layers"]), by)]
    for pattern, counts in found["patterns"].items():
        apart = f"; apart: {', '.join(counts['apart'])}" if counts["apart"] else ""
        where = f"{counts['fused']} of {counts['of']} by {by}{apart}"
        rows.append(row(f"fused/{pattern}", counts["fused"] / counts["of"], where))
    return rows


def _rows(
    artifact: Artifact,
    gate: str,
    limits: Mapping[str, Limit],
    found: Mapping[str, Found],
    stand_in: str | None = None,
) -> list[Result]:
    """A row per limit; "mean_kl/image" is judged by what was found as "mean_kl"."""
    rows = []
    for metric, limit in limits.items():
        measured = found.get(metric.split("/")[0], Found(None, "the golden file lacks what this is measured on"))
        rows.append(judge(artifact, gate, metric, measured.value, limit, measured.where, stand_in))
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = bundle_parser("parity", "Checks a bundle's artifacts against its golden outputs.", __doc__ or "")
    parser.add_argument("--component", metavar="NAME", help="one component, such as lm or image_decoder (default: all)")
    parser.add_argument("--form", metavar="NAME", help="one form, such as fused or standard (default: all)")
    parser.add_argument("--stand-in", metavar="MACHINE", help="report proxies, naming this machine so")
    parser.add_argument("--on-device", action="store_true", help="this is the profile's device, though unrecognised")
    parser.add_argument("--no-report", action="store_true", help="leave the bundle's report.json as it is")
    return parser.parse_args(arguments)


def check_and_report(bundle: Bundle, selection: Selection = ALL) -> list[Result]:
    """Checks, and merges the rows into the bundle's report. Raises what `check` does, ReportError, BundleError."""
    report = read_report(bundle.folder)
    results = check(bundle, selection)
    write_report(bundle.folder, report.merged(results=results, environment=environment()))
    return results


def run(options: argparse.Namespace) -> int:
    """Checks, prints and reports. Exit status 1 when a gate fails."""
    bundle = open_bundle(options.bundle, options.trust)
    if not options.no_report:
        check_writable(bundle.folder / REPORT_JSON)
    selection = Selection(
        options.component,
        options.backend,
        options.form,
        options.mode,
        options.threads,
        options.stand_in,
        options.on_device,
    )
    results = check(bundle, selection) if options.no_report else check_and_report(bundle, selection)
    print_report(Report(results=tuple(results)))
    count = Counter(row.status for row in results)
    print(f"{bundle.folder}: " + ", ".join(f"{count[status]} {status}" for status in sorted(count)))
    return 1 if count["failed"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
