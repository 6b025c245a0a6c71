"""The protocol of a backend's exporter, and the table of those there are.

Adding a backend is one exporter file here, one runtime file, one column of lowerings in ``exporters/ops``, and a row
in the two tables. An exporter's file loads its vendor's package, so it is imported when a profile asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from device_profiles.schema import Profile
from exporters.errors import ExportError
from exporters.inheritance import StoredMatrix
from exporters.program import Program
from exporters.traffic import bytes_per_token
from runtimes.bundle import Artifact

#: (form, mode) of an artifact, as in a profile's "openvino/ir/exact".
Kind = tuple[str, str]
Feeds = Mapping[str, np.ndarray]

#: backend -> (module, class, what `pip install '.[EXTRA]'` brings it)
EXPORTERS: Mapping[str, tuple[str, str, str]] = {
    "onnx": ("exporters.onnx_", "OnnxExporter", "onnx"),
    "openvino": ("exporters.openvino_", "OpenVinoExporter", "openvino"),
    "tvm": ("exporters.tvm_", "TvmExporter", "tvm"),
    "coreml": ("exporters.coreml_", "CoreMlExporter", "coreml"),
    "tensorrt": ("exporters.tensorrt_", "TensorRtExporter", "tensorrt,cuda"),
}


class BackendMissing(ExportError):
    """A backend that this version does not build, or whose package is not installed."""


def _nothing(size: int) -> None:
    """The progress callback of a caller that wants none."""


def _no_samples() -> Iterator[Feeds]:
    return iter(())


@dataclass(frozen=True)
class Job:
    """What an exporter is asked to make of one program.

    Attributes:
        out: folder of the bundle; a backend writes into a folder of its own name in it.
        kinds: the (form, mode) pairs to write; each was in `forms` and had nothing in `unsupported`.
        samples: feeds of the program made from the student's own pictures and recordings, for calibration; empty for
            the language model.
        progress: called with the bytes of what is written.
        about: what an app needs to know of the student (exporters/about.py).
    """

    program: Program
    profile: Profile
    out: Path
    kinds: Sequence[Kind]
    samples: Callable[[], Iterator[Feeds]] = field(default=_no_samples)
    progress: Callable[[int], None] = field(default=_nothing)
    about: Mapping[str, Any] = field(default_factory=dict)


class Exporter(Protocol):
    """One backend. Errors are ExportErrors that name node, op, backend and the way out."""

    name: str

    def forms(self, program: Program) -> tuple[Kind, ...]:
        """The (form, mode) pairs that make sense for a program."""

    def unsupported(self, program: Program, profile: Profile, kind: Kind) -> list[str]:
        """Reasons why ``kind`` cannot be made for ``profile``, each naming the node or the field; [] if it can.
        Writes nothing and reads no weight."""

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes the files and describes them, one artifact per kind; `preferred` is left False."""

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Writes what the backend's artifacts of one bundle share, once all of them are there; most share nothing."""

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """Prefix of the Program's constants -> the quantised matrix that stands in the artifact's own files.
        Only matrices that some node computes with: a weight that nothing reads did not arrive."""

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """Copies the artifact into the folder ``out``, with further outputs: intermediate values of the graph.

        Args:
            nodes: names of nodes of the Program's graph whose (first) result is wanted.

        Returns:
            The new artifact, whose files are relative to ``out`` and whose further outputs are in its `outputs`, and
            Program node -> name of the output that holds its value; nodes that the backend fused away are missing.
        """


def new_artifact(
    program: Program,
    backend: str,
    kind: Kind,
    files: Sequence[str],
    precision: Mapping[str, str],
    operators: Mapping[str, int],
    runtime: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Artifact:
    """The artifact of a program: what every backend says the same way, and what it says itself.

    Args:
        files: relative to the bundle, the one that is opened first.
        operators: operator -> how often it stands in the artifact.
        runtime, options: see Artifact.
    """
    return Artifact(
        component=program.entry,
        backend=backend,
        form=kind[0],
        mode=kind[1],
        model=files[0],
        files=tuple(files),
        inputs=program.inputs,
        outputs=program.outputs,
        states=program.states,
        precision=precision,
        bytes_per_token=bytes_per_token(program),
        operators=dict(sorted(operators.items())),
        preferred=False,
        runtime=runtime or {},
        options=options or {},
    )


@cache
def load_exporter(name: str) -> Exporter:
    """The one exporter of a backend. Raises BackendMissing."""
    entry = EXPORTERS.get(name)
    if entry is None:
        raise BackendMissing(
            "is not built in this version", where=f"backend {name}", way_out=f"Built: {', '.join(EXPORTERS)}."
        )
    module, kind, extra = entry
    try:
        return getattr(import_module(module), kind)()
    except ModuleNotFoundError as error:
        raise BackendMissing(
            f"package {error.name} is not installed",
            where=f"backend {name}",
            way_out=f"Install it: pip install -c constraints.txt '.[{extra}]', or choose others with --backends.",
        ) from error
