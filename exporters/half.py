"""The same program in float16, typed by tracing it anew: what a strongly typed backend such as TensorRT takes.

Weights, states and activations become float16; integers stay, and the caller's outputs keep their dtypes. What an op
computes in float32 inside (a norm's mean square, a softmax) stays float32, because its reference says so. A scale that
float16 cannot hold exactly stays float32: the student's quantisation is not rounded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.utils._pytree import tree_leaves

from exporters import ops
from exporters.errors import ExportError
from exporters.program import Constant, Program

ATEN = torch.ops.aten
LOOKUPS = (ops.quantized_embedding.overload, ops.table_embedding.overload)


def to_half(program: Program, floating: Callable[[str], bool] = lambda name: False) -> Program:
    """``program`` with float16 weights, states and activations. Its nodes' names may differ: see program.sources.

    Args:
        floating: tells of a constant's name whether it stays float32, besides the scales that need it.

    Raises:
        ExportError: a weight is larger than float16 holds.
    """
    constants = {
        name: constant
        if constant.dtype != "float32" or floating(name) or _is_wide_scale(program, name, constant)
        else Constant("float16", constant.shape, partial(_halved, name, constant))
        for name, constant in program.constants.items()
    }
    module = program.exported.module()
    _retype_weights(module, constants)
    _retype_graph(module.graph, program)
    module.recompile()
    states = tuple(replace(state, dtype="float16") for state in program.states)
    specs = (*program.inputs, *states)
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = tree_leaves(program.exported.example_inputs)  # their sizes keep the guards of the first tracing
        examples = tuple(
            torch.zeros(example.shape, dtype=getattr(torch, spec.dtype))
            for example, spec in zip(traced, specs, strict=True)
        )
    with torch.no_grad():
        exported = torch.export.export(module, examples, dynamic_shapes=_dynamic(module, specs), strict=False)
    return replace(program, exported=exported, states=states, constants=constants)


def _dynamic(module: torch.nn.Module, specs: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export's description of the symbolic sizes; arguments that arrive as *args are one nested tuple."""
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in specs
    )
    parameters = inspect.signature(module.forward).parameters.values()
    own = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    return shapes if own == len(specs) else (*shapes[:own], shapes[own:])


def _retype_weights(module: torch.nn.Module, constants: dict[str, Constant]) -> None:
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                constant = constants.get(prefix + name)
                if tensor is None or constant is None or constant.dtype != "float16":
                    continue
                halved = tensor.detach().to(torch.float16)
                table[name] = torch.nn.Parameter(halved, False) if table is owner._parameters else halved


def _retype_graph(graph: Graph, program: Program) -> None:
    """Edits ``graph``: dtypes that it names become float16; the caller's tensors are converted on their way."""
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    floats = {node for node, spec in zip(placeholders, program.inputs, strict=False) if spec.dtype == "float32"}
    for node in list(graph.nodes):
        if node in floats:
            _cast_behind(graph, node, torch.float16)
        elif node.op == "call_function":
            node.args = tuple(torch.float16 if arg is torch.float32 else arg for arg in node.args)
            node.kwargs = {key: torch.float16 if arg is torch.float32 else arg for key, arg in node.kwargs.items()}
            if node.target in LOOKUPS:  # their rows have their scales' dtype, or float32
                _cast_behind(graph, node, torch.float16)
        elif node.op == "output":
            with graph.inserting_before(node):
                results = list(node.args[0])
                for index, spec in enumerate(program.outputs):
                    if spec.dtype == "float32":
                        results[index] = graph.call_function(ATEN.to.dtype, (results[index], torch.float32))
                node.args = (tuple(results),)


def _cast_behind(graph: Graph, node: torch.fx.Node, dtype: torch.dtype) -> None:
    with graph.inserting_after(node):
        cast = graph.call_function(ATEN.to.dtype, (node, dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _is_wide_scale(program: Program, name: str, constant: Constant) -> bool:
    """Whether these are a quantised matrix's scales and some of them is no float16 number."""
    prefix, _, part = name.rpartition(".")
    if part != "scales" or prefix not in program.inherited:
        return False
    values = constant.load()
    with np.errstate(over="ignore"):
        return not np.array_equal(values.astype(np.float16).astype(np.float32), values)


def _halved(name: str, constant: Constant) -> np.ndarray:
    values = constant.load()
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    if np.isinf(halved).any() and not np.isinf(values).any():
        raise ExportError(
            f"holds {np.abs(values).max():.3g}, more than float16's 65504",
            where=f"weight {name}",
            way_out="Ask for an artifact in float32 (mode exact) in the profile.",
        )
    return halved
