"""A Program in float16: which values change their type, which must not, and that it is the same function."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters import ops
from exporters.errors import ExportError
from exporters.families.decoder_lm import capture_lm
from exporters.half import to_half
from exporters.program import Constant, Inherited, Program, capture
from exporters.student import load_student
from runtimes.bundle import StateSpec, TensorSpec
from tests.conftest import MakeStudent

COLUMNS, ROWS, CAPACITY = 64, 6, 32
#: A float16 number, and one that lies between two of them.
FINE, BETWEEN = 0.0625, 0.0625 * (1 + 2.0**-12)


class Layer(nn.Module):
    """A lookup, a quantised product, an explicit type, integers and a norm: one of each that half treats apart."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        random = np.random.default_rng(0)
        for name, rows in (("table", 9), ("w", ROWS)):
            self.register_buffer(f"{name}_codes", torch.from_numpy(random.integers(0, 256, (rows, 2, 16), np.uint8)))
        self.register_buffer("table_scales", torch.full((9, 2), FINE))
        self.w = nn.Module()
        self.w.register_buffer("codes", self.w_codes)
        self.w.register_buffer("scales", torch.full((ROWS, 2), scale))
        self.norm = nn.Parameter(torch.linspace(0.5, 2, COLUMNS))

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = ops.quantized_embedding(ids, self.table_codes, self.table_scales, None, 4, COLUMNS)
        total = ops.rms_norm(rows + x, self.norm, 1e-5) + torch.ones(COLUMNS, dtype=torch.float32)
        y = ops.quantized_linear(total, self.w.codes, self.w.scales, None, None, 4, COLUMNS)
        return y, ids + 1


def layer(scale: float = FINE) -> Program:
    examples = (torch.zeros(1, 3, dtype=torch.int32), torch.rand(1, 3, COLUMNS))
    specs = (TensorSpec("y", "float32", (1, "S", ROWS)), TensorSpec("next", "int32", (1, "S")))
    dynamic = {"ids": {1: "S"}, "x": {1: "S"}}
    inherited = {"w": Inherited(("w",), (ROWS,), COLUMNS, 4, 32)}
    return capture("lm", Layer(scale).eval(), examples, dynamic, specs, ("ids", "x"), inherited=inherited)


def wide(program: Program) -> Counter[Any]:
    """What gives float32: operators, and the caller's inputs by name."""
    found: Counter[Any] = Counter()
    for node in program.exported.graph.nodes:
        value = node.meta.get("val")
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, Tensor) and first.dtype == torch.float32 and node.op != "output":
            found[node.target] += 1
    return found


def results(program: Program) -> list[torch.dtype]:
    [output] = [node for node in program.exported.graph.nodes if node.op == "output"]
    return [node.meta["val"].dtype for node in output.args[0]]


def test_values_inside_are_float16_and_the_callers_keep_their_types() -> None:
    program = to_half(layer())
    assert wide(program) == {"x": 1, ops.quantized_embedding.overload: 1, torch.ops.aten.to.dtype: 1}
    assert results(program) == [torch.float32, torch.int32]
    assert {name: constant.dtype for name, constant in program.constants.items() if "codes" in name} == {
        "table_codes": "uint8", "w_codes": "uint8", "w.codes": "uint8",
    }  # fmt: skip
    for name in ("table_scales", "w.scales", "norm"):
        assert program.constants[name].dtype == program.constants[name].load().dtype.name == "float16"
    assert (program.inputs, program.outputs) == (layer().inputs, layer().outputs)


@pytest.mark.parametrize("length", [1, 2, 3, 11])
def test_it_is_the_same_function_at_lengths_that_were_not_traced(length: int) -> None:
    before, after = layer(), to_half(layer())
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 9, (1, length), dtype=torch.int32, generator=generator)
    x = torch.randn(1, length, COLUMNS, generator=generator)
    for got, expected in zip(after.exported.module()(ids, x), before.exported.module()(ids, x), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3 * float(expected.detach().abs().max()))


def test_scales_that_float16_does_not_hold_stay_float32() -> None:
    program = to_half(layer(BETWEEN))
    assert program.constants["w.scales"].dtype == "float32"
    assert program.constants["table_scales"].dtype == "float16"
    np.testing.assert_array_equal(program.constants["w.scales"].load(), np.full((ROWS, 2), BETWEEN, np.float32))
    assert results(program) == [torch.float32, torch.int32]


@pytest.mark.parametrize("scale", [1e6, 1e-9], ids=["too large", "too small"])
def test_scales_outside_the_range_of_float16_stay_float32(scale: float) -> None:
    program = to_half(layer(scale))
    np.testing.assert_array_equal(program.constants["w.scales"].load(), np.full((ROWS, 2), scale, np.float32))


def test_a_constant_that_the_caller_names_stays_float32() -> None:
    program = to_half(layer(), lambda name: name == "norm")
    assert program.constants["norm"].dtype == "float32" and program.constants["w.scales"].dtype == "float16"


def with_weight(value: float) -> Program:
    program = layer()
    values = np.full(COLUMNS, value, np.float32)
    return replace(program, constants={**program.constants, "norm": Constant.of(values)})


@pytest.mark.parametrize("value", [7e4, -7e4, 65520.0])
def test_a_weight_that_float16_does_not_hold_is_refused_by_name(value: float) -> None:
    program = to_half(with_weight(value))
    with pytest.raises(ExportError, match=r"weight norm: holds [67]\.?\d*e\+04, more than float16's 65504\. .*exact"):
        program.constants["norm"].load()


@pytest.mark.parametrize("value", [65504.0, np.inf, -np.inf])
def test_the_largest_number_and_infinity_are_float16_numbers(value: float) -> None:
    np.testing.assert_array_equal(to_half(with_weight(value)).constants["norm"].load(), np.full(COLUMNS, value))


class Attention(nn.Module):
    """Attention with RoPE tables and a cache, whose arguments arrive as a model's do: some by *args."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(CAPACITY)[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0])
        self.register_buffer("cos", torch.cos(angles))
        self.register_buffer("sin", torch.sin(angles))

    def forward(self, rows: Tensor, last: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return ops.kv_attention(rows, None, None, *past, last, self.cos, self.sin, 2, 1, 0.3, 0, 0.0)


def attention() -> Program:
    cache = torch.zeros(1, 1, CAPACITY, 8)
    examples = (torch.rand(1, 3, 32), torch.tensor([2], dtype=torch.int32), cache, cache.clone())
    states = tuple(StateSpec(n, "float32", tuple(cache.shape), n, f"new_{n}") for n in ("key", "value"))
    spec = (TensorSpec("y", "float32", (1, "S", 16)),)
    names = ("rows", "last", "key", "value")
    return capture("lm", Attention(), examples, {"rows": {1: "S"}}, spec, names, states)


@pytest.mark.parametrize("kept", [True, False])
def test_states_are_float16_and_tables_as_the_caller_says(kept: bool) -> None:
    program = to_half(attention(), lambda name: kept and name in ("cos", "sin"))
    assert [state.dtype for state in program.states] == ["float16", "float16"]
    assert results(program) == [torch.float32, torch.float16, torch.float16]
    kind = "float32" if kept else "float16"
    assert {name: constant.dtype for name, constant in program.constants.items()} == {"cos": kind, "sin": kind}
    rows, last = torch.randn(1, 7, 32), torch.tensor([6], dtype=torch.int32)
    caches = [torch.full((1, 1, CAPACITY, 8), float("nan")) for _ in range(2)]
    expected = attention().exported.module()(rows, last, *caches)
    got = program.exported.module()(rows, last, *(cache.half() for cache in caches))
    torch.testing.assert_close(got[0], expected[0], rtol=5e-3, atol=5e-3)
    for new, wanted in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(new.float(), wanted, rtol=5e-3, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize("variant", ["int4", pytest.param("float", marks=pytest.mark.long)])
def test_nothing_of_a_language_model_stays_float32_by_accident(variant: str, make_tiny_student: MakeStudent) -> None:
    program = to_half(capture_lm(load_student(make_tiny_student(variant=variant)), 64))
    lookups = {ops.quantized_embedding.overload: 1} if variant == "int4" else {}
    assert wide(program) == lookups | {torch.ops.aten.to.dtype: 1}
    assert results(program)[0] == torch.float32 and set(results(program)[1:]) == {torch.float16}
    assert {constant.dtype for constant in program.constants.values()} <= {"float16", "uint8"}
