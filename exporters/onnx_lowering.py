"""From a Program to an ONNX model: what every backend that is fed ONNX has in common."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir
import torch

from exporters.decompose import decompose
from exporters.passes.context import Context, ModelPass
from exporters.program import Program, sources
from exporters.uncollected import uncollected

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
    with warnings.catch_warnings(), torch.no_grad(), uncollected():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside torch by its own use of pytree
        decomposed, first = decompose(program.exported, table)
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
    # Decompositions of torch.onnx have been traced on top of ours.
    second = sources(exported.exported_program)
    origins = {name: first[source] for name, source in second.items() if source in first}
    if names is not None:
        origins = {name: names[source] for name, source in origins.items() if source in names}
    return model, Context(program, origins)
