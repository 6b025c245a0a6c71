"""From a Program to an ONNX model: what every backend that is fed ONNX has in common."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from exporters.passes.context import Context, ModelPass
from exporters.program import Program, sources

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision, which nothing here uses


def to_onnx(
    program: Program,
    table: Mapping[object, Callable],
    opset: int,
    passes: Iterable[ModelPass],
    names: Mapping[str, str] | None = None,
) -> ir.Model:
    """The program as an ONNX model whose large initializers are still to be loaded.

    Args:
        table: operator -> decomposition that re-expresses it.
        opset: version of the standard operator set.
        passes: what the model goes through after lowering, in order.
        names: node of ``program`` -> node of the Program that it was traced anew from; None where it is that itself.
    """
    model, context = translate(program, table, opset, names)
    for edit in passes:
        edit(model, context)
    return model


def translate(
    program: Program, table: Mapping[object, Callable], opset: int, names: Mapping[str, str] | None = None
) -> tuple[ir.Model, Context]:
    """The first half of `to_onnx`, which tracing takes most of the time of: the model as its passes will get it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside torch by its own use of pytree
        decomposed = program.exported.run_decompositions(dict(table))
        exported = torch.onnx.export(
            decomposed,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in program.inputs] + [state.input for state in program.states],
            output_names=[spec.name for spec in program.outputs] + [state.output for state in program.states],
        )
    model = exported.model
    origins = _origins(decomposed, exported.exported_program)
    if names is not None:
        origins = {name: names[source] for name, source in origins.items() if source in names}
    return model, Context(program, origins)


def _origins(decomposed: ExportedProgram, final: ExportedProgram) -> dict[str, str]:
    """Name of a node in the graph that became ONNX -> name of the Program's node that it came from.

    Two tracings lie between them: our decompositions, and those of torch.onnx.
    """
    first, second = sources(decomposed), sources(final)
    return {name: first.get(source, source) for name, source in second.items() if source in first}
