"""The rows of the op table (tests/exporters/op_cases.py) on the CPU kernels, and shapes that kernels treat apart."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.exporters import op_cases
from tests.exporters.op_cases import CAPACITY, CASES, Case
from tests.kernels import calls

LIMIT = 3e-6
PLAIN = {name: getattr(calls, name) for name in (
    "quantized_linear", "quantized_embedding", "rms_norm", "add_rms_norm", "swiglu", "codebook_lookup"
)}  # fmt: skip
#: Ops that have no kernel here: the CPU's programs compute their decomposition, or another kernel their rewriting.
DECOMPOSED = {
    "projection", "bias_snake", "group_norm_silu", "table_linear", "table_embedding", "quantize_activation"
}  # fmt: skip
FLOAT32 = [case for case in CASES if "float16" not in case.label]


def assert_near(actual, expected, limit=LIMIT) -> None:
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit * np.abs(expected).max())


def test_cases() -> None:
    assert {case.op for case in FLOAT32} == {*PLAIN, "snake", "kv_attention", "rope_angles", *DECOMPOSED}


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.op in PLAIN], ids=str)
def test_table(run, case: Case) -> None:
    for length, tasks in ((1, 1), (6, 3)):
        inputs = case.inputs(np.random.default_rng(length), length)
        result = PLAIN[case.op](run, **inputs, **case.fixed, tasks=tasks)
        expected = case.formula(**inputs, **case.fixed)
        for one, other in zip(result if isinstance(result, tuple) else (result,), expected, strict=True):
            assert_near(one, other)


def weights(random, bits: int, block: int, zeros: bool, rows: int, columns: int) -> dict:
    blocks = -(-columns // block)
    return {
        "codes": random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "scales": random.uniform(0.001, 0.1, (rows, blocks)).astype(np.float32),
        "zeros": random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None,
        "bias": random.standard_normal(rows).astype(np.float32) if rows % 2 else None,
        "bits": bits,
        "columns": columns,
    }


MATRICES = [
    # bits, block, zero points, rows, columns: whole and broken panels, more than one block of depth, broken blocks
    (4, 32, True, 320, 192),
    (4, 32, False, 33, 100),
    (4, 128, True, 65, 300),
    (4, 16, True, 17, 48),
    (8, 64, False, 120, 192),
    (8, 256, True, 47, 530),
    (2, 32, True, 31, 96),
]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_quantized_linear_exact(run, matrix) -> None:
    random = np.random.default_rng(7)
    fixed = weights(random, *matrix)
    for m, tasks in ((1, 1), (2, 2), (3, 1), (4, 3), (5, 1), (17, 2), (64, 1)):
        x = random.standard_normal((m, matrix[4])).astype(np.float32)
        assert_near(calls.quantized_linear(run, x, **fixed, tasks=tasks), op_cases.quantized_linear(x, **fixed)[0])


def rounded(x, block: int):
    """What the fast kernels multiply with: int8 with one scale a row and block."""
    result = np.zeros(x.shape)
    for at in range(0, x.shape[1], block):
        part = x[:, at : at + block]
        scale = np.abs(part).max(1, keepdims=True) / np.float32(127)
        result[:, at : at + block] = np.rint(part / scale) * scale
    return result


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_quantized_linear_fast(run, matrix) -> None:
    """Rounded activations, exact integers: the formula on rounded rows, but for a value that lay between two."""
    random = np.random.default_rng(8)
    fixed = weights(random, *matrix)
    for m, tasks in ((1, 2), (2, 1), (3, 1), (4, 1), (5, 2), (17, 1)):
        x = random.standard_normal((m, matrix[4])).astype(np.float32)
        result = calls.quantized_linear(run, x, **fixed, fast=True, tasks=tasks)
        assert_near(result, op_cases.quantized_linear(rounded(x, matrix[1]), **fixed)[0], 1e-4)


def test_fast_rows_of_zeros_and_of_extremes(run) -> None:
    """Codes of 255 against activations of 127: sums that saturate 16 bits."""
    fixed = weights(np.random.default_rng(3), 8, 32, False, 20, 64)
    fixed["codes"][:] = 255
    x = np.ones((2, 64), np.float32)
    x[1] = 0
    result = calls.quantized_linear(run, x, **fixed, fast=True)
    assert_near(result, op_cases.quantized_linear(x, **fixed)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("rows", "columns"), [(33, 70), (64, 300)])
def test_linear(run, dtype, rows, columns) -> None:
    random = np.random.default_rng(2)
    weight = random.standard_normal((rows, columns)).astype(dtype)
    bias = random.standard_normal(rows).astype(np.float32) if rows == 33 else None
    for m, tasks in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (17, 1), (64, 3)):
        x = random.standard_normal((m, columns)).astype(np.float32)
        expected = x.astype(float) @ weight.astype(float).T + (0 if bias is None else bias)
        assert_near(calls.linear(run, x, weight, bias, tasks=tasks), expected)


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.op == "kv_attention"], ids=str)
def test_attention_table(run, case: Case) -> None:
    rows = case.inputs(np.random.default_rng(1), 11)
    sizes = {name: case.fixed[name] for name in ("heads", "kv_heads", "scale", "window", "softcap")}
    splits = ((11,), (4, 1, 6), (1,) * 11)
    check_attention(run, rows, case.fixed["cos"], case.fixed["sin"], sizes, CAPACITY, splits, whole(case.label))


LONG = [(32, 6, 2, 0), (32, 6, 2, 30), (20, 5, 1, 0), (64, 7, 7, 30)]
STEPS = 83


@cache
def long_attention(width: int, heads: int, kv_heads: int, window: int):
    """Arguments of ``check_attention`` for 83 steps, and the formula's results."""
    angles = np.arange(STEPS + 9)[:, None] / 100.0 ** np.linspace(0, 1, width // 2, endpoint=False)
    rows = np.random.default_rng(4).standard_normal((1, STEPS, (heads + 2 * kv_heads) * width)).astype(np.float32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    sizes = {"heads": heads, "kv_heads": kv_heads, "scale": width**-0.5, "window": window, "softcap": 0.0}
    return {"query": rows}, cos, sin, sizes, op_cases.kv_attention(rows, None, None, cos, sin, **sizes)


@cache
def whole(label: str):
    case = next(case for case in CASES if case.op == "kv_attention" and case.label == label)
    rows = case.inputs(np.random.default_rng(1), 11)
    return case.formula(**{"key": None, "value": None} | rows | case.fixed)


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_attention_long(run, shape) -> None:
    """More queries than a unit of work takes, more scores than are held at a time, more heads than one step takes."""
    rows, cos, sin, sizes, expected = long_attention(*shape)
    check_attention(run, rows, cos, sin, sizes, STEPS + 9, ((STEPS,), (70, 1, 12)), expected)


def check_attention(run, rows, cos, sin, sizes, capacity, splits, results) -> None:
    """Runs in pieces equal the whole at once; slots never written hold NaN, and still do at the end."""
    expected, *stored = results
    batch, kv_heads, steps, width = stored[0].shape
    for tasks, split in enumerate(splits, 1):
        caches = [np.full((batch, kv_heads, capacity, width), np.nan, np.float32) for _ in range(2)]
        held, out = 0, []
        for now in split:
            parts = [row[:, held : held + now] for row in rows.values()]
            held += now
            last = np.full(batch, held - 1, np.int32)
            out.append(calls.kv_attention(run, parts, caches, last, cos, sin, **sizes, tasks=tasks))
        assert_near(np.concatenate(out, 1), expected)
        for slots, written in zip(caches, stored, strict=True):
            assert_near(slots[:, :, :steps], written)
            assert np.isnan(slots[:, :, steps:]).all()


@pytest.mark.parametrize(("rows", "codes", "channels"), [(1, 1, 1), (64, 256, 8), (7, 1000, 5), (33, 17, 64)])
def test_nearest_code(run, rows: int, codes: int, channels: int) -> None:
    random = np.random.default_rng(rows)
    table = random.standard_normal((codes, channels)) + 3  # so that the zeros that fill a panel are far, then near
    for x in (random.standard_normal((rows, channels)) + 3, random.standard_normal((rows, channels)) / 10):
        x, table = x.astype(np.float32), table.astype(np.float32)
        apart = ((x[:, None].astype(float) - table) ** 2).sum(-1)
        for tasks in (1, 3):
            np.testing.assert_array_equal(calls.nearest_code(run, x, table, tasks=tasks), apart.argmin(1))


def test_the_first_of_equally_near_codes_is_taken(run) -> None:
    table = np.repeat(np.eye(3, dtype=np.float32), 40, 0)
    for tasks in (1, 2):
        found = calls.nearest_code(run, np.eye(3, dtype=np.float32)[[2, 0, 1, 1, 0]], table, tasks=tasks)
        assert found.tolist() == [80, 0, 40, 40, 0]
