"""Finds the first node of a program whose value in an artifact is not the reference's.

    python -m tools.bisect_parity BUNDLE --backend NAME [--component lm] [--form F] [--mode M] [--package DIR]

The reference is the Program itself, run node by node in PyTorch on the student's weights. The artifact runs on a golden
input with the ends of its blocks as further outputs, then with every node of the first block that differs. Names are
the Program's, and those of the checkpoint's modules. Observing can change what a backend fuses, so the observed
artifact's own outputs are compared with the plain one's, and a difference is reported.

Exit status: 0 nothing differs, 1 a node was found, 2 the input cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.backends import load_exporter
from exporters.errors import ExportError
from exporters.families import capture_student
from exporters.package import validate
from exporters.program import Program
from exporters.reference import VARIANTS, assemble
from exporters.student import load_student
from runtimes.bundle import Artifact, Bundle, FileInfo, load_bundle
from runtimes.cli import exit_code
from runtimes.errors import Fault
from runtimes.golden import load_cases, load_lm
from runtimes.session import choose_artifact, open_session
from tools.node_values import Difference, NodeValue, Reference, blocks_of, compare

#: Tokens of the prompt where a backend takes any length.
PROMPT = 24

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """A run that is compared: what it is, and the runs of a fresh session that end with it."""

    name: str
    runs: tuple[Feeds, ...]


@dataclass(frozen=True)
class Finding:
    """What a bisection found.

    Attributes:
        stage: the run in which a node differs.
        block: path of the checkpoint's module, as in "model.layers.2".
        difference: the first node that differs.
        module: path of the module that the node belongs to.
        notes: what observing changed, and what could not be observed.
    """

    stage: str
    block: str
    difference: Difference
    module: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        found = self.difference
        lines = [
            f"{self.stage}: the first block that differs is {self.block}",
            f"  first node: {found.node} ({self.module or 'of the wrapper'}): {found.what}",
            f"  off by {found.error:.3g} of its largest value, {found.limit:.3g} would be noise",
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def stages(bundle: Bundle, artifact: Artifact, lengths: Sequence[int]) -> Iterator[Stage]:
    """A golden prompt and one step on its cache, or the first golden case; ``lengths`` are the session's."""
    if artifact.component != "lm":
        yield Stage("golden case 0", (load_cases(bundle, artifact)[0].feeds,))
        return
    ids = load_lm(bundle).ids
    row = ids[:1]
    room = min(row.shape[1], bundle.context) - 1
    # On compiled lengths a prompt of exactly one of them is one run, whose values are the whole prompt's.
    length = max((size for size in lengths or (PROMPT,) if size <= room), default=1)
    prompt = {"ids": np.ascontiguousarray(row[:, :length])}
    yield Stage(f"prefill of {length} tokens", (prompt,))
    yield Stage(f"decoding at position {length}", (prompt, {"ids": np.ascontiguousarray(row[:, length : length + 1])}))


class Watch:
    """Runs an artifact of a bundle with chosen nodes observed."""

    def __init__(self, bundle: Bundle, artifact: Artifact, program: Program) -> None:
        self.bundle, self.artifact, self.program = bundle, artifact, program
        self._exporter = load_exporter(artifact.backend)

    def plain(self, stage: Stage) -> dict[str, np.ndarray]:
        """The artifact's own outputs."""
        return _outputs(self.bundle, self.artifact, stage)

    def observed(self, stage: Stage, nodes: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(own outputs, Program node -> value), from a copy of the artifact that returns both."""
        with tempfile.TemporaryDirectory(prefix="bisect-") as scratch:
            out = Path(scratch)
            copy, names = self._exporter.observe(self.bundle.folder, self.artifact, self.program, nodes, out)
            files = {path: FileInfo(0, "") for path in copy.files}
            watched = replace(self.bundle, folder=out, files={**self.bundle.files, **files})
            outputs = _outputs(watched, copy, stage)
        own = {spec.name: outputs[spec.name] for spec in self.artifact.outputs}
        return own, {node: outputs[name] for node, name in names.items()}


def _outputs(bundle: Bundle, artifact: Artifact, stage: Stage) -> dict[str, np.ndarray]:
    with open_session(bundle, artifact, 1) as session:
        for feeds in stage.runs:
            found = session.run(feeds)
        return {name: np.array(value) for name, value in found.items()}


def expected_values(program: Program, stage: Stage, mode: str) -> dict[str, NodeValue]:
    """The reference's values in the last run of a stage."""
    reference, position = Reference(program, mode), 0
    for feeds in stage.runs:
        if program.states:
            position += feeds["ids"].shape[1]
            feeds = {**feeds, "last": np.array([position - 1], np.int32)}
        values = reference.step(feeds)
    return values


def bisect(bundle: Bundle, artifact: Artifact, program: Program) -> Finding | None:
    """The first node that differs in the first stage that has one; None where all agree.

    Raises:
        Fault: the artifact cannot be run here.
    """
    watch, blocks = Watch(bundle, artifact, program), blocks_of(program)
    modules = {node.name: _module(node) for node in program.exported.graph.nodes}
    with open_session(bundle, artifact, 1) as session:
        lengths = session.lengths
    for stage in stages(bundle, artifact, lengths):
        expected, plain = expected_values(program, stage, artifact.mode), watch.plain(stage)
        own, ends = watch.observed(stage, [nodes[-1] for nodes in blocks.values()])
        # Where the backend fused a block's end away, the last of its nodes that is still there stands for it.
        lacking = [block for block, nodes in blocks.items() if nodes[-1] not in ends]
        if lacking:
            own, more = watch.observed(stage, [node for block in lacking for node in blocks[block]])
            ends |= more
        notes = _disturbance(plain, own)
        block = next((b for b, nodes in blocks.items() if any(compare(n, expected, ends) for n in nodes)), None)
        if block is None:
            continue
        own, inside = watch.observed(stage, blocks[block])
        first = next(filter(None, (compare(node, expected, inside) for node in blocks[block])), None)
        notes += [note for note in _disturbance(plain, own) if note not in notes]
        if first is None:
            first = next(filter(None, (compare(node, expected, ends) for node in blocks[block])))
            notes.append("with every node of the block observed the difference is gone: it comes from a fusion in it")
        if hidden := [node for node in blocks[block] if node not in inside]:
            notes.append(f"not observable, fused into others: {', '.join(hidden)}")
        return Finding(stage.name, block, first, modules[first.node], tuple(notes))
    return None


def _disturbance(plain: Feeds, observed: Feeds) -> list[str]:
    """What observing did to the artifact's own outputs."""
    notes = []
    for name, value in plain.items():
        if not np.array_equal(value, observed[name], equal_nan=True):
            change = np.abs(value - observed[name]).max() / max(float(np.abs(value).max()), 1e-30)
            notes.append(f"observing changed {name} by {change:.2g} of its largest value")
    return notes


def _module(node) -> str:
    stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack else ""


@contextmanager
def package_of(bundle: Bundle, given: Path | None) -> Iterator[Path]:
    """The package that the bundle was made from: the given one, or the variant of the reference student with its hash.

    Raises:
        Fault: it is another student's.
    """
    if given is not None:
        if validate(given).sha256 != bundle.student.sha256:
            raise Fault("is not the student that the bundle was made from", str(given), "Name that package.")
        yield given
        return
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory(prefix="bisect-student-") as scratch:
            folder = assemble(variant, Path(scratch) / variant)
            if validate(folder).sha256 == bundle.student.sha256:
                yield folder
                return
    raise Fault("was made from a student that is not shipped", str(bundle.folder), "Name its package with --package.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bisect_parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that exporters.build made")
    parser.add_argument("--backend", required=True, metavar="NAME", help="whose artifact is looked at")
    parser.add_argument("--component", default="lm", metavar="NAME", help="lm (default), image_decoder, ...")
    parser.add_argument("--form", metavar="NAME", help="form of the artifact (default: the preferred one)")
    parser.add_argument("--mode", metavar="NAME", help="mode of the artifact (default: the preferred one)")
    parser.add_argument("--package", type=Path, metavar="DIR", help="the student (default: the shipped reference one)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Bisects and prints. Exit status 1 when a node differs."""
    # Not verified against its hashes: a bundle that was altered is what this tool is for.
    bundle = load_bundle(options.bundle)
    artifact = choose_artifact(bundle, options.component, options.backend, options.form, options.mode)
    try:
        with package_of(bundle, options.package) as package:
            student = load_student(package)
            program = next(p for p in capture_student(student, bundle.context) if p.entry == artifact.component)
            finding = bisect(bundle, artifact, program)
    except ExportError as error:
        raise Fault(error.what, error.where, error.way_out) from error
    print(f"{artifact.component} {artifact.label}: {finding or 'no node differs from the reference'}")
    return 0 if finding is None else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
