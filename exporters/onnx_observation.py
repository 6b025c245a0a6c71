"""Copies an ONNX artifact with intermediate values as further outputs, from the files as they were written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from exporters.passes.mark_origins import NODE
from runtimes.bundle import Artifact, TensorSpec

#: Prefix of the further outputs' names.
PREFIX = "observed."


def observe(folder: Path, artifact: Artifact, nodes: Sequence[str], out: Path) -> tuple[Artifact, Mapping[str, str]]:
    """See Exporter.observe. A Program node's value is the first output of the last ONNX node that came from it."""
    for path in artifact.files:
        if path != artifact.model:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / path, out / path)
    model = ir.load(folder / artifact.model)
    last = {node.metadata_props[NODE]: node for node in model.graph if NODE in node.metadata_props}
    # The graph's own outputs keep their names: a value that is one of them already is observed under that.
    names, specs = {}, []
    for node in nodes:
        if node not in last:
            continue
        value = last[node].outputs[0]
        if not value.is_graph_output():
            value.name = f"{PREFIX}{node}"
            model.graph.outputs.append(value)
            specs.append(TensorSpec(value.name, "float32", ("?",)))
        names[node] = value.name
    target = out / artifact.model
    target.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, target)
    return replace(artifact, outputs=(*artifact.outputs, *specs)), names


def _link(source: Path, target: Path) -> None:
    """A second name for a weight file that nothing writes to, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
