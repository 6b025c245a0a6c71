"""Every fused op through every target: eager reference and exported graph against a formula in float64."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import ops
from exporters.errors import ExportError
from exporters.program import Program, capture
from runtimes.bundle import StateSpec, TensorSpec
from tests.exporters.op_cases import CAPACITY, CASES, Array, Case
from tests.exporters.runners import RUNNERS, Runner, Step

#: Of the eager reference.
TOLERANCE = {"exact": 0.0, "float32": 3e-6, "float16": 3e-3, "code": 3e-6}
#: The length at capture, one that was not seen there, and the smallest.
LENGTHS = (4, 7, 1)
#: Ways to cut one sequence of the attention op into runs.
SPLITS = ((7, 1, 1, 5), (3, 9, 2), (1, 1, 1, 1, 10))

PLAIN = [case for case in CASES if case.op != "kv_attention"]
ATTENTION = [case for case in CASES if case.op == "kv_attention"]

each_plain = pytest.mark.parametrize("case", PLAIN, ids=str)
each_attention = pytest.mark.parametrize("case", ATTENTION, ids=str)


def each_target(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Every runner with every case that it does not leave to another one of its backend."""
    rows = [
        pytest.param(runner, case, id=f"{runner.target}-{case}", marks=[pytest.mark.long] * runner.is_long(case))
        for runner in RUNNERS.values()
        for case in cases
        if str(case) not in runner.left_out
    ]
    return pytest.mark.parametrize(("runner", "case"), rows)


class Call(torch.nn.Module):
    """One call of a fused op; arrays among its fixed arguments are buffers, as weights are."""

    def __init__(self, case: Case, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.op, self.inputs, self.fixed = ops.REGISTRY[case.op], inputs, dict(case.fixed)
        # What has a default and no place in the case is left out, as a capture leaves it out.
        parameters = inspect.signature(self.op.reference).parameters
        given = {*case.fixed, *inputs}
        self.order = tuple(name for name, each in parameters.items() if each.default is each.empty or name in given)
        for name, value in case.fixed.items():
            if isinstance(value, np.ndarray):
                self.register_buffer(name, torch.from_numpy(self.fixed.pop(name)))

    def forward(self, *inputs: torch.Tensor) -> Any:
        values = self.fixed | dict(self.named_buffers()) | dict(zip(self.inputs, inputs, strict=True))
        return self.op(*(values[name] for name in self.order))


def caches(case: Case, inputs: Mapping[str, Array], filler: float = 0.0) -> dict[str, Array]:
    """Caches of the attention op in which nothing was written; ``filler`` is what happens to be there."""
    heads, kv_heads = case.fixed["heads"], case.fixed["kv_heads"]
    query = inputs["query"]
    width = query.shape[2] // (heads if "key" in inputs else heads + 2 * kv_heads)
    shape = (query.shape[0], kv_heads, CAPACITY, width)
    return {name: np.full(shape, filler, query.dtype) for name in ("past_key", "past_value")}


def last_position(case: Case, inputs: Mapping[str, Array], held: int) -> dict[str, Array]:
    batch, steps = inputs["query"].shape[:2]
    return {"last": np.full(batch, held + steps - 1, np.int32)}


def eager(case: Case) -> Step:
    """The registered op."""

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        result = Call(case, tuple(inputs))(*map(torch.from_numpy, inputs.values()))
        return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]

    return step


def capture_call(case: Case) -> Program:
    """The program of one call; the caches of the attention op are its states."""
    inputs, states = case.inputs(np.random.default_rng(0), LENGTHS[0]), {}
    if case.op == "kv_attention":
        states = caches(case, inputs)
        inputs |= last_position(case, inputs, 0)
    names = (*inputs, *states)
    results = 2 if case.op in ("add_rms_norm", "rope_angles") else 1
    return capture(
        "lm",
        Call(case, names),
        tuple(map(torch.from_numpy, (*inputs.values(), *states.values()))),
        {name: {axis: "S"} for name, axis in case.dynamic.items()},
        tuple(TensorSpec(f"y{i}", "float32", ()) for i in range(results)),
        names,
        tuple(StateSpec(name, v.dtype.name, v.shape, name, f"new_{name}") for name, v in states.items()),
    )


def exported(case: Case, runner: Runner, folder: Path) -> Step | None:
    """The op through a backend's exporter and runtime; None where the backend refused it as it must."""
    program = capture_call(case)
    if (reason := runner.refused(case)) is None:
        return runner.build(case, program, folder)
    with pytest.raises(ExportError, match=reason):
        runner.build(case, program, folder)
    return None


def assert_near(got: Array, expected: Array, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance


def check_plain(case: Case, step: Step, tolerance: float) -> None:
    for length in LENGTHS:
        inputs = case.inputs(np.random.default_rng(length), length)
        for got, expected in zip(step(inputs), case.formula(**inputs, **case.fixed), strict=True):
            assert_near(got, expected, tolerance)


def check_attention(case: Case, step: Step, tolerance: float, filler: float) -> None:
    """Runs in pieces, with the cache handed on, equal the whole sequence at once, whatever unwritten slots hold."""
    rows = case.inputs(np.random.default_rng(1), sum(SPLITS[0]))
    expected, *stored = case.formula(**{"key": None, "value": None} | rows | case.fixed)
    for split in SPLITS:
        past, held, out = caches(case, rows, filler), 0, []
        for steps in split:
            inputs = {name: np.ascontiguousarray(row[:, held : held + steps]) for name, row in rows.items()}
            inputs |= last_position(case, inputs, held)
            result, *new = step(inputs | past)
            past, held = dict(zip(past, new, strict=True)), held + steps
            out.append(result)
        assert_near(np.concatenate(out, 1), expected, tolerance)
        for cache, written in zip(past.values(), stored, strict=True):
            assert_near(cache[:, :, :held], written, tolerance)
            np.testing.assert_array_equal(cache[:, :, held:], filler)


def test_every_op_is_in_the_table_for_every_target() -> None:
    assert {case.op for case in CASES} == set(ops.REGISTRY)
    assert all(set(runner.operators) == set(ops.REGISTRY) for runner in RUNNERS.values())
    labels = {str(case) for case in CASES}
    assert len(labels) == len(CASES)
    for runner in RUNNERS.values():
        assert runner.left_out | (runner.usual or set()) <= labels
        assert not runner.usual or runner.usual.isdisjoint(runner.left_out)
        assert {case.op for case in CASES if str(case) not in runner.left_out} == set(ops.REGISTRY)


@each_plain
def test_reference(case: Case) -> None:
    check_plain(case, eager(case), TOLERANCE[case.tolerance])


@each_target(PLAIN)
def test_exported(case: Case, runner: Runner, tmp_path: Path) -> None:
    if (step := exported(case, runner, tmp_path)) is not None:
        check_plain(case, step, runner.tolerance[case.tolerance])


@each_attention
def test_attention_reference(case: Case) -> None:
    check_attention(case, eager(case), TOLERANCE[case.tolerance], np.nan)


@each_target(ATTENTION)
def test_attention_exported(case: Case, runner: Runner, tmp_path: Path) -> None:
    if (step := exported(case, runner, tmp_path)) is not None:
        check_attention(case, step, runner.tolerance[case.tolerance], runner.filler)
