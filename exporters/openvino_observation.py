"""A copy of a saved model that also returns values from inside it, for tools/bisect_parity.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov

from exporters.openvino_convert import value_name
from exporters.program import Program
from runtimes.bundle import Artifact, TensorSpec


def observe(
    folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
) -> tuple[Artifact, Mapping[str, str]]:
    """See Exporter.observe. The caches are not among what can be observed: they grow here, the Program's do not."""
    model = ov.Core().read_model(folder / artifact.model)
    results = program.exported.graph.output_node().args[0]
    caches = {node.name for node in results[len(program.outputs) :]}
    held = {
        name: output for node in model.get_ordered_ops() for output in node.outputs() for name in output.get_names()
    }
    found = {node: value_name(node) for node in nodes if value_name(node) in held and node not in caches}
    for name in dict.fromkeys(found.values()):
        model.add_outputs(held[name])
    path = out / artifact.model
    path.parent.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, path, compress_to_fp16=False)
    further = tuple(_spec(name, held[name]) for name in dict.fromkeys(found.values()))
    return replace(artifact, outputs=artifact.outputs + further), found


def _spec(name: str, output: ov.Output) -> TensorSpec:
    sizes = output.get_partial_shape()
    shape = tuple(size.get_length() if size.is_static else f"N{axis}" for axis, size in enumerate(sizes))
    return TensorSpec(name, np.dtype(output.get_element_type().to_dtype()).name, shape)
