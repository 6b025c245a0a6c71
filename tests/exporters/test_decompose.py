"""Decomposing one operator at a time against decomposing by tracing anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters import ops
from exporters.decompose import decompose
from exporters.program import Program, capture, sources
from runtimes.bundle import TensorSpec


class Twice(nn.Module):
    """Two equal layers, one of another width, an operator with two results, and a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ParameterList([nn.Parameter(torch.rand(8)) for _ in range(2)])
        self.inner = nn.ParameterList([nn.Parameter(torch.rand(16, 8)) for _ in range(2)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x
        for norm, inner in zip(self.norms, self.inner, strict=True):
            normed, total = ops.add_rms_norm(x, total, norm, 1e-5)
            x = ops.swiglu(normed @ inner.t())
        return self.last(x), ops.swiglu(total)


def twice() -> Program:
    outputs = (TensorSpec("y", "float32", (1, "S", 4)), TensorSpec("z", "float32", (1, "S", 4)))
    return capture("lm", Twice(), (torch.rand(1, 5, 8),), {"x": {1: "S"}}, outputs, ("x",))


TABLE = {op.overload: op.reference for op in ops.REGISTRY.values()}


def test_the_values_are_those_of_the_program_for_every_size() -> None:
    program = twice()
    before = [node.name for node in program.exported.graph.nodes]
    decomposed, _ = decompose(program.exported, TABLE)
    assert not any(str(node.target).startswith("edge.") for node in decomposed.graph.nodes)
    for length in (5, 2, 9):
        x = torch.rand(1, length, 8)
        for ours, expected in zip(decomposed.module()(x), program.exported.module()(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert [node.name for node in program.exported.graph.nodes] == before


def test_nodes_come_from_the_nodes_that_another_tracing_says() -> None:
    program = twice()
    decomposed, origins = decompose(program.exported, TABLE)
    calls = [node for node in decomposed.graph.nodes if node.op == "call_function"]
    assert {origins[node.name] for node in calls} <= {node.name for node in program.exported.graph.nodes}
    traced = program.exported.run_decompositions(dict(TABLE))
    assert {origins[node.name] for node in calls} == {
        source
        for name, source in sources(traced).items()
        if name in {n.name for n in traced.graph.nodes if n.op == "call_function"}
    }
    places = {node.name: node.meta.get("nn_module_stack") for node in program.exported.graph.nodes}
    assert all(node.meta.get("nn_module_stack") == places[origins[node.name]] for node in calls)


def test_equal_nodes_are_traced_once() -> None:
    traced: list[tuple[int, ...]] = []

    def spied(joined: Tensor) -> Tensor:
        traced.append(tuple(joined.shape[2:]))
        return ops.swiglu.reference(joined)

    decompose(twice().exported, {ops.swiglu.overload: spied})
    assert sorted(traced) == [(8,), (16,)]


def test_a_shape_is_worked_out_once_in_a_tracing(monkeypatch) -> None:
    from exporters.ops import _registry

    asked: list[tuple[int, ...]] = []

    def half(x: Tensor) -> Tensor:
        asked.append(tuple(x.shape[1:]))
        return x[..., : x.shape[-1] // 2] * 2

    monkeypatch.delitem(_registry.REGISTRY, "half", raising=False)
    op = _registry.fused_op({})(half)
    monkeypatch.delitem(_registry.REGISTRY, "half")

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(op(x)) + op(op(x + 1))

    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Halves(), (torch.rand(3, 8),), dynamic_shapes=dynamic, strict=False)
    assert sorted(asked) == [(4,), (8,)]
    assert [
        tuple(node.meta["val"].shape)[1:] for node in exported.graph.find_nodes(op="call_function", target=op.overload)
    ] == [
        (4,),
        (2,),
        (4,),
        (2,),
    ]
    for rows in (2, 7):
        x = torch.rand(rows, 8)
        torch.testing.assert_close(exported.module()(x), 4 * x[:, :2] + 4 * (x[:, :2] + 1))
