"""The OpenVINO backend: Program to ``.xml`` and ``.bin``, read by OpenVINO's own reader of exported programs.

Forms:
    ir/exact    float32 everywhere; the session pins the plugin's precision
    ir/fast     the same files, with what the plugin does by itself: bfloat16, int8 activations, an int8 KV cache
    ir/fp16     float weights stored as float16
    int8/fast   a discretizer's decoder with its convolutions quantised after training (exporters/openvino_int8.py)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov

from exporters import openvino_observation
from exporters.backends import Job, Kind, new_artifact
from exporters.inheritance import StoredMatrix
from exporters.openvino_convert import Unreadable, convert, read
from exporters.openvino_int8 import Quantised, quantise
from exporters.openvino_weights import read_matrices
from exporters.ops.openvino import CODE_TYPES
from exporters.program import Program
from exporters.traffic import stored_precision
from runtimes.bundle import Artifact

if TYPE_CHECKING:
    from device_profiles import Profile

#: What the runtime on the device must be: an IR is read by its own release and later ones, but proven with this one.
RELEASE = ".".join(ov.__version__.split(".")[:2])


class OpenVinoExporter:
    """Exporter protocol for OpenVINO."""

    name = "openvino"

    def __init__(self) -> None:
        self._asked: tuple[Program, tuple[str, ...]] | None = None

    def forms(self, program: Program) -> tuple[Kind, ...]:
        """See Exporter."""
        exact, fast, half = ("ir", "exact"), ("ir", "fast"), ("ir", "fp16")
        if program.entry == "lm":
            return exact, fast, half
        return (exact, fast, half, ("int8", "fast")) if program.entry.endswith("_decoder") else (exact, half)

    def unsupported(self, program: Program, profile: Profile, kind: Kind) -> list[str]:
        """See Exporter. The whole graph is read, without weights."""
        reasons = [
            f"{program.entry}: matrix {name} has {matrix.bits} bits, OpenVINO holds {', '.join(map(str, CODE_TYPES))}"
            for name, matrix in program.inherited.items()
            if matrix.bits not in CODE_TYPES
        ]
        return reasons + [f"{program.entry}: {sentence}" for sentence in self._untranslated(program)]

    def _untranslated(self, program: Program) -> tuple[str, ...]:
        """The nodes that cannot be read, in words. A planner asks for each kind in turn: a program is read once."""
        if self._asked is None or self._asked[0] is not program:
            try:
                read(program)
                found: tuple[str, ...] = ()
            except Unreadable as error:
                found = error.nodes
            self._asked = program, found
        return self._asked[1]

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes openvino/<entry>.<form>.xml and .bin; the exact and the fast mode share theirs."""
        folder = job.out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        model = convert(job.program, job.progress)
        written: dict[str, Path] = {}
        artifacts = []
        for form, mode in job.kinds:
            stem = f"{job.program.entry}.{'fp16' if mode == 'fp16' else form}"
            quantised = quantise(model, job.samples(), job.program.entry) if form == "int8" else None
            if stem not in written:
                written[stem] = folder / f"{stem}.xml"
                chosen = model if quantised is None else quantised.model
                ov.save_model(chosen, written[stem], compress_to_fp16=mode == "fp16")
            artifacts.append(_artifact(job, (form, mode), written[stem], quantised))
        return tuple(artifacts)

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Nothing is shared."""

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """See Exporter."""
        return read_matrices(folder / artifact.model)

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """See Exporter."""
        return openvino_observation.observe(folder, artifact, program, nodes, out)


def _artifact(job: Job, kind: Kind, path: Path, quantised: Quantised | None) -> Artifact:
    program = job.program
    files = tuple(file.relative_to(job.out).as_posix() for file in (path, path.with_suffix(".bin")))
    operators = Counter(node.get_type_name() for node in ov.Core().read_model(path).get_ops())
    options: dict[str, Any] = {"device": job.profile.openvino_device or "CPU"}
    if quantised is not None:
        options |= {"float_layers": list(quantised.floating), "snr_db": round(quantised.snr_db, 2)}
    precision = _precision(program, kind, quantised)
    return new_artifact(
        program, OpenVinoExporter.name, kind, files, precision, operators, {"openvino": RELEASE}, options
    )


def _precision(program: Program, kind: Kind, quantised: Quantised | None) -> dict[str, str]:
    weights = stored_precision(program)
    if quantised is not None:
        kept = ", ".join((*quantised.floating, "transposed convolutions"))
        layers = f"{quantised.convolutions - len(quantised.floating)} of {quantised.convolutions} convolutions"
        return {
            "weights": f"int8 in {layers}; float32: {kept}",
            "activations": "int8 into those convolutions, else the plugin's choice",
        }
    if kind[1] == "fp16":
        return {"weights": weights.replace("float32", "float16"), "activations": "float16"}
    return {"weights": weights, "activations": "float32" if kind[1] == "exact" else "the plugin's choice"}
