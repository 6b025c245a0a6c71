"""Re-expresses operators of a captured graph, one at a time.

ExportedProgram.run_decompositions traces the whole graph anew. Here the decomposition of an operator is traced alone,
once for all nodes that are alike as those of equal layers are, and its nodes are copied into their places; the rest of
the graph stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from exporters.ops import described, layout
from exporters.passes.graph import place_of


def decompose(exported: ExportedProgram, table: Mapping[object, Callable]) -> tuple[ExportedProgram, Mapping[str, str]]:
    """A program without the operators in ``table``, and name of a node of it -> name of the node that it came from.

    Args:
        table: operator -> function of the same arguments in other operators, without constants of its own.
    """
    graph, bodies = Graph(), {}
    now: dict[Node, Any] = {}
    origins: dict[str, str] = {}

    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target in table:
            given, body = _body(node, table, bodies)
            made = dict(zip(body.find_nodes(op="placeholder"), map(now.__getitem__, given), strict=True))
            own = [each for each in body.nodes if each.op not in ("placeholder", "output")]
            now[node] = graph.graph_copy(body, made)
            for each in own:
                made[each].meta.update(place_of(node))
                origins[made[each].name] = node.name
        elif node.target is operator.getitem and not isinstance(now[node.args[0]], Node):
            now[node] = now[node.args[0]][node.args[1]]
        else:
            now[node] = graph.node_copy(node, now.__getitem__)
            origins[now[node].name] = node.name
    results = {node.name: made.name for node, made in now.items() if isinstance(made, Node)}
    return _with_graph(exported, graph, results), origins


def _body(node: Node, table: Mapping[object, Callable], bodies: dict[tuple, Graph]) -> tuple[list[Node], Graph]:
    """The nodes that ``node`` reads, and the graph that computes its results from them."""
    flat, structure = tree_flatten((node.args, node.kwargs))
    places = [index for index, each in enumerate(flat) if isinstance(each, Node)]
    values = [each.meta["val"] if isinstance(each, Node) else each for each in flat]
    key = node.target, str(structure), *map(described, values)

    def call(*read):
        arguments = list(values)
        for index, value in zip(places, read, strict=True):
            arguments[index] = value
        args, kwargs = tree_unflatten(arguments, structure)
        return table[node.target](*args, **kwargs)

    if key not in bodies:
        read = [values[index] for index in places]
        with next(value.fake_mode for value in read if isinstance(value, FakeTensor)):
            # A tensor of its own for each place: two nodes may share one value, which tracing would take for one input.
            fresh = [layout(value)() if isinstance(value, torch.Tensor) else value for value in read]
            bodies[key] = make_fx(call, dict(table), pre_dispatch=True)(*fresh).graph
    return [flat[index] for index in places], bodies[key]


def _with_graph(exported: ExportedProgram, graph: Graph, results: Mapping[str, str]) -> ExportedProgram:
    signature = exported.graph_signature
    outputs = [
        replace(spec, arg=replace(spec.arg, name=results.get(spec.arg.name, spec.arg.name)))
        for spec in signature.output_specs
    ]
    return ExportedProgram(
        GraphModule(torch.nn.Module(), graph),
        graph,
        ExportGraphSignature(signature.input_specs, outputs),
        exported.state_dict,
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        exported.constants,
        verifiers=exported.verifiers,
    )
