"""Program, the value that travels: one captured graph per entry point, with its weights left where they are.

The graph is captured on meta tensors. Each weight is a Constant that knows how to load itself, so capture costs no
memory and an exporter can stream weights from the checkpoint to the artifact one at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from exporters.encodings import INTEGER
from exporters.uncollected import uncollected
from runtimes.bundle import StateSpec, TensorSpec


@dataclass(frozen=True)
class Constant:
    """A weight that is loaded when asked for.

    Attributes:
        dtype: numpy dtype name.
        shape: dimensions.
        load: reads, decodes or computes the values; nothing is kept.
        rows: the same for some of the rows, None where that is no cheaper than all of them.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    rows: Callable[[slice], np.ndarray] | None = None

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
        encoding: what the codes stand for (exporters/encodings.py).
        row_order: module behind it whose act-order the rows of every source are in: row i is a source's order[i].
        order_folded: the columns' act-order stands in the rows of the matrices in front, so no gather is left of it.
        paired: the rows of every two sources alternate: those of one on even rows, of the other on odd ones.
    """

    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bits: int
    block: int
    encoding: str = INTEGER
    row_order: str | None = None
    order_folded: bool = False
    paired: bool = False


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

    @property
    def stored(self) -> dict[str, str]:
        """Name of a placeholder of the graph that is no input -> name of what it holds, as in ``constants``."""
        signature = self.exported.graph_signature
        return {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }


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
    with torch.no_grad(), uncollected():
        exported = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    if constants is None:
        constants = {
            name: Constant.of(t.detach().numpy()) for name, t in {**exported.state_dict, **exported.constants}.items()
        }
    # Numbers that the code itself makes tensors of belong to no module, so nobody else has a value for them.
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants.values()
    constants = {name: Constant.of(exported.constants[name].detach().numpy()) for name in lifted} | dict(constants)
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


def specialise(program: Program, sizes: Mapping[str, int]) -> Program:
    """The same program with its symbolic dimensions fixed, for backends that compile fixed shapes.

    The nodes' names may differ from the original's: `sources` leads back to those.

    Args:
        sizes: value of each symbol in the inputs' shapes, as in {"S": 16}.

    Raises:
        KeyError: a symbol without a value.
    """

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape))

    inputs = tuple(map(fixed, program.inputs))
    # Weights may be fake tensors already; those of a program captured with real ones take part as they are.
    with FakeTensorMode(allow_non_fake_inputs=True):
        examples = tuple(
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in (*inputs, *program.states)
        )
    with torch.no_grad():
        exported = torch.export.export(program.exported.module(), examples, strict=False)
    results = [node.meta["val"] for node in next(iter(reversed(exported.graph.nodes))).args[0]]
    outputs = tuple(
        replace(spec, shape=tuple(map(int, value.shape)))
        for spec, value in zip(program.outputs, results, strict=False)  # the states' follow
    )
    return replace(program, exported=exported, inputs=inputs, outputs=outputs)


def sources(exported: ExportedProgram) -> dict[str, str]:
    """Name of a node -> name of the node that it was traced from, in the graph before.

    Of a program from `specialise`: the original's names. Every decomposition is one more tracing.
    """
    return {node.name: node.meta["from_node"][-1].name for node in exported.graph.nodes if node.meta.get("from_node")}
