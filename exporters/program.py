"""Program, the value that travels: one captured graph per entry point, with its weights left where they are.

The graph is captured on meta tensors. Each weight is a Constant that knows how to load itself, so capture costs no
memory and an exporter can stream weights from the checkpoint to the artifact one at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.export import ExportedProgram

from runtimes.bundle import StateSpec, TensorSpec


@dataclass(frozen=True)
class Constant:
    """A weight that is loaded when asked for.

    Attributes:
        dtype: numpy dtype name.
        shape: dimensions.
        load: reads, decodes or computes the values; nothing is kept.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @classmethod
    def of(cls, values: np.ndarray) -> Constant:
        """A constant that is already in memory."""
        return cls(values.dtype.name, values.shape, lambda: values)


@dataclass(frozen=True)
class Inherited:
    """Which quantised weights of the student stand in one matrix of the Program, stacked along its rows.

    Attributes:
        sources: module names of the student.
        rows: rows of each.
        columns, bits, block: K, bits per code, columns per block.
    """

    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bits: int
    block: int


@dataclass(frozen=True)
class Program:
    """One entry point of a student as a graph.

    Attributes:
        entry: "lm", "image_decoder", "image_encoder", "audio_decoder" or "audio_encoder".
        exported: graph over meta or real tensors; fused ops appear as ``edge::*`` nodes.
        inputs, outputs: the caller's tensors, in order; states are not among them.
        states: tensors that a session keeps, each an input and an output of the graph.
        constants: name in the graph's state -> how to load it.
        inherited: prefix of the constants codes, scales and zeros -> the student's tensors in them.
    """

    entry: str
    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...] = ()
    constants: Mapping[str, Constant] = field(default_factory=dict)
    inherited: Mapping[str, Inherited] = field(default_factory=dict)


def capture(
    entry: str,
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: tuple[TensorSpec, ...],
    names: tuple[str, ...],
    states: tuple[StateSpec, ...] = (),
    constants: Mapping[str, Constant] | None = None,
    inherited: Mapping[str, Inherited] | None = None,
) -> Program:
    """Traces ``module`` with torch.export.

    Args:
        examples: one tensor per name; dynamic sizes must be at least 2, or torch specialises them.
        dynamic: input name -> {axis: symbol}.
        names: the caller's inputs, then the states' inputs.
        constants: how to load each parameter and buffer; by default the module's own values.
    """
    shapes = tuple(dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in names)
    own = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if len(own) < len(names):  # the rest arrives as *args, which torch.export describes by one nested tuple
        shapes = (*shapes[: len(own)], tuple(shapes[len(own) :]))
    with torch.no_grad():
        exported = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    if constants is None:
        constants = {
            name: Constant.of(t.detach().numpy()) for name, t in {**exported.state_dict, **exported.constants}.items()
        }
    caller = names[: len(names) - len(states)]
    inputs = tuple(
        TensorSpec(
            name,
            str(example.dtype).removeprefix("torch."),
            tuple(dynamic.get(name, {}).get(axis, size) for axis, size in enumerate(example.shape)),
        )
        for name, example in zip(caller, examples, strict=False)
    )
    return Program(entry, exported, inputs, outputs, states, constants, dict(inherited or {}))
