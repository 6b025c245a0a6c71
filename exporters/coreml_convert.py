"""One function of a Core ML package: a Program, at fixed sizes or with flexible ones, through the vendor's converter.

The language model's KV cache leaves in one of two forms. As *states*, float16 tensors that Core ML updates in place,
whose last two dimensions are multiples of 32 because the Neural Engine takes no others. Or, since Core ML has no
float32 states, as float32 inputs and outputs: the exact mode, for proving the conversion.
"""

from __future__ import annotations

import gc
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.traceback import preserve_node_meta

from exporters import ops
from exporters.ops import coreml as column
from exporters.program import Program, sources, specialise
from runtimes.bundle import StateSpec

#: The Neural Engine's unit of a state's last two dimensions.
ALIGNMENT = 32
#: Longest flexible dimension of an encoder or decoder: batch, frames or samples.
LARGEST_BATCH, LARGEST_LENGTH = 64, 1 << 20
#: Channels that share one palette.
GROUP = 16


@dataclass(frozen=True)
class Recipe:
    """How the functions of one package are made.

    Attributes:
        half: compute in float16, with the cache as states.
        channels: lay the language model out for the Neural Engine.
        target: the deployment target's name in coremltools, as in "iOS18".
        palettised: replace float weights by tables of their clusters.
        bits: of an index into such a table.
    """

    half: bool
    channels: bool
    target: str
    palettised: bool = False
    bits: int = 8


def state_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[1, KV, C, D] of a cache with C and D raised to the next multiple of 32."""
    return (*shape[:-2], *(-(-size // ALIGNMENT) * ALIGNMENT for size in shape[-2:]))


class _Stateful(nn.Module):
    """``forward(*inputs) -> outputs`` of a module that takes and returns states, which are buffers here."""

    def __init__(self, program: nn.Module, states: tuple[StateSpec, ...]) -> None:
        super().__init__()
        self.program, self._names = program, [state.name for state in states]
        for state in states:
            dtype = getattr(torch, state.dtype)
            self.register_buffer(state.name, torch.zeros(state_shape(state.shape), dtype=dtype))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        held = [self.get_buffer(name) for name in self._names]
        # Run node by node, so that what is traced knows which node it came from.
        with preserve_node_meta():
            results = torch.fx.Interpreter(self.program).run(*inputs, *held)
        outputs, new = results[: -len(held)], results[-len(held) :]
        for buffer, value in zip(held, new, strict=True):
            buffer.copy_(value)
        return outputs[0] if len(outputs) == 1 else outputs


@contextmanager
def quietly() -> Iterator[None]:
    """Around the vendor's calls: without its progress bars, and without what it collects garbage of.

    It collects after every step, which takes longer than the step where much else is loaded.
    """
    gc.freeze()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        gc.unfreeze()


def convert(program: Program, recipe: Recipe, sizes: Mapping[str, int] | None, path: Path) -> None:
    """Writes one function as a package of its own at ``path``.

    Args:
        sizes: value of each symbolic dimension, None to leave them flexible.
    """
    import coremltools as ct

    graph, names = _graph(program, recipe, sizes)
    scope = column.Scope(channels=recipe.channels and bool(program.states), constants=names)
    stateful = recipe.half and bool(program.states)
    inputs = [
        ct.TensorType(name=spec.name, shape=_shape(spec.shape, sizes), dtype=np.dtype(spec.dtype).type)
        for spec in program.inputs
    ]
    outputs = [ct.TensorType(name=spec.name, dtype=np.dtype(spec.dtype).type) for spec in program.outputs]
    if not stateful:
        inputs += [ct.TensorType(name=s.input, shape=s.shape, dtype=np.dtype(s.dtype).type) for s in program.states]
        outputs += [ct.TensorType(name=s.output, dtype=np.dtype(s.dtype).type) for s in program.states]
    pipeline = ct.PassPipeline.DEFAULT
    # It makes lengths and indices 16 bits wide, which positions in a long sound or a large vocabulary outgrow.
    # The other one multiplies a table by the scales in front of it: a table of its own for every block of codes.
    pipeline.remove_passes({"common::add_int16_cast", "common::canonicalize_quantized_lut_pattern"})
    precision = ct.transform.FP16ComputePrecision(op_selector=Searches()) if recipe.half else ct.precision.FLOAT32
    with column.lowering(scope), warnings.catch_warnings(), quietly():
        warnings.simplefilter("ignore")
        model = ct.convert(
            graph,
            inputs=inputs,
            outputs=outputs,
            minimum_deployment_target=getattr(ct.target, recipe.target),
            compute_precision=precision,
            compute_units=ct.ComputeUnit.CPU_ONLY,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
    if recipe.palettised:
        model = _palettised(model, recipe.bits)
    model.save(str(path))


def _palettised(model: Any, bits: int) -> Any:
    """The model with each group of channels of a large weight as indices into a table of its own."""
    import coremltools.optimize.coreml as optimize

    options = optimize.OpPalettizerConfig(nbits=bits, granularity="per_grouped_channel", group_size=GROUP)
    with quietly():
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=options))


def _shape(shape: tuple[int | str, ...], sizes: Mapping[str, int] | None) -> tuple[Any, ...]:
    import coremltools as ct

    def size(value: int | str) -> Any:
        if isinstance(value, int):
            return value
        if sizes is not None:
            return sizes[value]
        return ct.RangeDim(1, LARGEST_BATCH if value == "B" else LARGEST_LENGTH, default=None)

    return tuple(map(size, shape))


def _graph(
    program: Program, recipe: Recipe, sizes: Mapping[str, int] | None
) -> tuple[ExportedProgram, Mapping[str, str]]:
    """The graph that the vendor's converter reads, with real weights, and its placeholders' constants by name."""
    origins: list[dict[str, str]] = []
    if program.states:
        exported = _restate(program, recipe, sizes)
        origins.append(sources(exported))
    elif sizes is not None:
        exported = specialise(program, sizes).exported
        origins.append(sources(exported))
    else:
        exported = program.exported
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decomposed = exported.run_decompositions(column.decompositions(bool(program.states)))
    _rename(decomposed, [sources(decomposed), *origins])
    for node in decomposed.graph.nodes:
        node.target = column.RESPELLED.get(node.target, node.target)
    return decomposed, _load(decomposed, program)


def _restate(program: Program, recipe: Recipe, sizes: Mapping[str, int]) -> ExportedProgram:
    """The language model traced again: one fixed length, its caches as states or still as inputs and outputs."""
    module = program.exported.module(check_guards=False)
    for node in module.graph.nodes:
        if node.target == ops.kv_attention.overload:
            node.target = column.attention._opoverload
    module.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = tuple(
            torch.zeros(
                tuple(sizes[n] if isinstance(n, str) else n for n in spec.shape), dtype=getattr(torch, spec.dtype)
            )
            for spec in program.inputs
        )
        if recipe.half:
            module = _Stateful(module, program.states)
        else:
            inputs += tuple(torch.zeros(state.shape, dtype=getattr(torch, state.dtype)) for state in program.states)
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=False)


def _rename(exported: ExportedProgram, steps: list[dict[str, str]]) -> None:
    """Names every node after the Program's node that it was traced from; of several the last one."""
    wanted: dict[str, torch.fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:  # which comes from what it takes from
            name = node.name
            for step in steps:
                name = step.get(name, "")
            if name:
                wanted[name] = node
    signature = exported.graph_signature
    for name, node in wanted.items():
        old, node.name = node.name, column.PREFIX + name
        signature.replace_all_uses(old, node.name)


def _load(exported: ExportedProgram, program: Program) -> Mapping[str, str]:
    """Puts the Program's constants into the graph's state; placeholder -> name of the constant."""
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {}
    for placeholder, target in held.items():
        name = target.removeprefix("program.")
        if name in program.constants:
            names[placeholder] = name
            values = torch.from_numpy(program.constants[name].load())
            old = exported.state_dict.get(target)
            new = nn.Parameter(values, requires_grad=False) if isinstance(old, nn.Parameter) else values
            (exported.state_dict if target in exported.state_dict else exported.constants)[target] = new
        elif target in signature.buffers_to_mutate.values():
            exported.state_dict[target] = torch.zeros_like(exported.state_dict[target], device="cpu")
    return names


class Searches:
    """Chooses what computes in float16: all but searches for the nearest code.

    What leads to an index by arithmetic alone, without a convolution in between, compares distances that differ by
    less than float16 can tell.
    """

    INDEX = frozenset({"reduce_argmin", "reduce_argmax", "topk"})
    WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def __call__(self, op: Any) -> bool:
        return not self._searches(op)

    def _searches(self, op: Any) -> bool:
        if op.op_type in self.INDEX:
            return True
        if op.op_type in self.WEIGHTED:
            return False
        if op.name not in self._known:
            self._known[op.name] = False
            users = [user for output in op.outputs for user in output.child_ops]
            self._known[op.name] = bool(users) and any(map(self._searches, users))
        return self._known[op.name]
