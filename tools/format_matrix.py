"""What becomes of every checkpoint format in every backend, found by doing it, as a table in README.md.

    python -m tools.format_matrix [--check]

A cell exports a checkpoint of tools/make_checkpoints.py, reads codes, scales, zero points and act-order back from the
artifact's own files, compares them with the student's, and runs the artifact against transformers' model with the
weights that the codes stand for. `exact`: the numbers stand there in a field of their own width, in their own order.
`rewritten`: the same numbers in another arrangement, which is named. Where the export is refused, the cell says why.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.make_checkpoints import CASES, write

if TYPE_CHECKING:
    from exporters.inheritance import StoredMatrix
    from exporters.program import Program
    from exporters.quantized import QuantizedTensor
    from exporters.student import Student
    from runtimes.bundle import Artifact

README = Path(__file__).parent.parent / "README.md"
CAPACITY = 64
#: Prompt and steps that an artifact is run with.
RUNS = (np.array([[3, 14, 15, 92, 65]], np.int32), np.array([[35]], np.int32), np.array([[89]], np.int32))


@dataclass(frozen=True)
class Column:
    """One artifact of a profile.

    Attributes:
        tolerance: how far its logits may be off, as a share of the largest; None: not run.
        rewritings: what its passes arrange otherwise -> whether they do that to a tensor.
    """

    profile: str
    backend: str
    form: str
    mode: str
    tolerance: float | None = 2e-5
    rewritings: Mapping[str, Callable[[QuantizedTensor], bool]] = field(default_factory=dict)


#: What stands in the place of codes of a table, by exporters/passes/spell_tables.py and exporters/ops/tvm_tables.py
_REWRITTEN = {"integer": "twice the values as int8 with half the scales", "float32": "float32 weights"}
#: exporters/passes/split_bytes.py and spell_products.py
_PLANES = {"two 4-bit planes": lambda tensor: tensor.encoding == "integer" and tensor.bits > 4}
_CORRECTION = {"zero points by correction": lambda tensor: tensor.zero_points is not None}

#: title -> what is made
COLUMNS: Mapping[str, Column] = {
    "ONNX fused": Column("host", "onnx", "fused", "exact", rewritings=_PLANES),
    "ONNX standard": Column("host", "onnx", "standard", "exact"),
    "OpenVINO": Column("host", "openvino", "ir", "exact"),
    "TVM": Column("host", "tvm", "compiled", "exact"),
    "Core ML": Column("iphone-16-pro", "coreml", "mlprogram", "exact"),
    "TensorRT typed": Column("jetson-thor", "tensorrt", "typed", "exact", rewritings=_CORRECTION),
    "TensorRT kernels": Column("jetson-orin", "tensorrt", "fused", "fp16", 2e-2),
}


class Mismatch(AssertionError):
    """An artifact does not hold, or does not compute with, the student's own numbers."""


@dataclass(frozen=True)
class Checkpoint:
    """One case, loaded and captured."""

    student: Student
    program: Program
    logits: np.ndarray


def load(name: str, folder: Path) -> Checkpoint:
    """Writes a case into ``folder`` and captures it; its codes must stand for the weights that were written."""
    import torch

    from exporters.families.decoder_lm import build_reference, capture_lm
    from exporters.student import load_student

    weights = write(folder / name, name)
    student = load_student(folder / name)
    for module, weight in weights.items():
        if not np.array_equal(student.quantized[module].dequantize().view(np.uint32), weight.view(np.uint32)):
            raise Mismatch(f"{name}: {module} was decoded to other weights")
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate(RUNS, 1))
        logits = build_reference(student)(ids.long()).logits[0].numpy()
    return Checkpoint(student, capture_lm(student, CAPACITY), logits)


def cell(case: Checkpoint, column: Column, folder: Path) -> str:
    """The words of a cell. Raises Mismatch."""
    from device_profiles import load_profile
    from exporters.backends import Job, load_exporter
    from exporters.errors import ExportError
    from exporters.inheritance import compare

    exporter, kind, profile = load_exporter(column.backend), (column.form, column.mode), load_profile(column.profile)
    if reasons := exporter.unsupported(case.program, profile, kind):
        return f"refused: {_reason(reasons[0])}"
    try:
        [artifact] = exporter.export(Job(case.program, profile, folder, [kind]))
    except ExportError as error:
        return f"refused: {_reason(error.what)}"
    stored = exporter.read_matrices(folder, artifact, case.program)
    found = compare(artifact.label, case.program, stored, case.student.quantized)
    if found.mismatches or not found.total:
        raise Mismatch(f"{len(found.mismatches)} of {found.total} differ: {', '.join(found.mismatches[:4])}")
    if column.tolerance is not None:
        _run(case, artifact, folder, column.tolerance)
    return _words(case, column, stored)


def _reason(text: str) -> str:
    """The first reason without the names of the nodes and matrices that it was found at."""
    return re.sub(r"^\w+: (matrix )?(model|lm_head)\S* ", "", text)


def _run(case: Checkpoint, artifact: Artifact, folder: Path, tolerance: float) -> None:
    from types import SimpleNamespace

    from runtimes.session import open_session

    bundle = SimpleNamespace(
        folder=folder,
        file=lambda name: folder / name,
        vocab_size=case.student.config["vocab_size"],
        context=CAPACITY,
        modalities={},
        artifacts=(artifact,),
        files={},
    )
    with open_session(bundle, artifact, threads=1) as session:  # type: ignore[arg-type]
        position = 0
        for ids in RUNS:
            got = session.run({"ids": ids})["logits"][0]
            position += ids.shape[1]
            wanted = case.logits[position - 1]
            error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            if not error <= tolerance:
                raise Mismatch(f"{artifact.label}: logits are off by {error:.2g} of the largest at {position}")


def _words(case: Checkpoint, column: Column, stored: Mapping[str, StoredMatrix]) -> str:
    """ "exact", or what was arranged otherwise."""
    program, found = case.program, []
    tensors = {prefix: case.student.quantized[each.sources[0]] for prefix, each in program.inherited.items()}
    other = {stored[p].encoding for p, t in tensors.items() if stored[p].encoding != t.encoding}
    found += [_REWRITTEN[encoding] for encoding in sorted(other)]
    same = {prefix: t for prefix, t in tensors.items() if stored[prefix].encoding == t.encoding}
    wider = {(t.bits, stored[prefix].bits) for prefix, t in same.items() if stored[prefix].bits != t.bits}
    found += [f"{bits} bits in fields of {field}" for bits, field in sorted(wider)]
    if any(matrix.order is not None for matrix in stored.values()):
        found.append("gather")
    if any(each.order_folded for each in program.inherited.values()):
        found.append("rows reordered")
    found += [words for words, applies in column.rewritings.items() if any(map(applies, tensors.values()))]
    return f"rewritten: {'; '.join(found)}" if found else "exact"


def table() -> str:
    """The whole matrix in Markdown."""
    lines = [("checkpoint", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            loaded = load(name, Path(scratch))
            cells = [cell(loaded, column, Path(scratch) / str(i)) for i, column in enumerate(COLUMNS.values())]
        print(name, *cells, sep=" | ", file=sys.stderr)
        lines.append((case.format, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MARKS = ("<!-- formats -->", "<!-- /formats -->")


def read_table(text: str) -> dict[str, dict[str, str]]:
    """checkpoint -> column -> words, of the table that stands in README.md."""
    start, end = (text.index(mark) for mark in MARKS)
    rows = [line.strip("| ").split(" | ") for line in text[start:end].splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def main() -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the matrix of formats and backends into README.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is what it would be")
    check = parser.parse_args().check
    text = README.read_text("utf-8")
    start, end = (text.index(mark) for mark in MARKS)
    new = f"{text[: start + len(MARKS[0])]}\n{table()}\n{text[end:]}"
    if check:
        return int(new != text)
    README.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
