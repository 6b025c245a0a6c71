"""Elementwise functions against float64, over the range they promise."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels import calls
from tests.kernels.test_fused_ops import assert_near

FORMULAS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "snake": lambda x: x + np.sin(x) ** 2,
    "tanh": np.tanh,
}
#: name -> (largest argument, what the error is measured against)
RANGES = {"none": (1e30, np.abs), "silu": (80, np.abs), "snake": (4000, None), "tanh": (20, np.abs)}


@pytest.mark.parametrize("name", FORMULAS)
def test_accuracy(run, name) -> None:
    largest, against = RANGES[name]
    random = np.random.default_rng(5)
    x = np.concatenate([random.uniform(-1, 1, 20011) * size for size in (largest, largest / 20, 1.0, 1e-3)])
    x = x.astype(np.float32)
    result, expected = calls.activate(run, x, name, tasks=3).astype(float), FORMULAS[name](x.astype(float))
    if (
        against is None
    ):  # the sine's own error; the sum with x is then rounded to float32, half a unit of its last place
        limit = 3e-7 + np.spacing(np.abs(expected).astype(np.float32)) / 2
    else:
        limit = 4e-7 * against(expected) + 1e-37
    assert (np.abs(result - expected) <= limit).all(), np.max(np.abs(result - expected) / limit)


@pytest.mark.parametrize("name", ["silu", "tanh"])
def test_large_arguments_saturate(run, name) -> None:
    x = np.array([-1e4, -100, 100, 1e4, 0.0, -0.0], np.float32)
    expected = {"silu": [0, 0, 100, 1e4, 0, 0], "tanh": [-1, -1, 1, 1, 0, 0]}[name]
    np.testing.assert_allclose(calls.activate(run, x, name), expected, atol=1e-30)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (1, 6, 37), (1, 8, 5, 7)], ids=str)
@pytest.mark.parametrize("name", ["none", "silu"])
def test_group_norm(run, shape, name) -> None:
    random = np.random.default_rng(6)
    groups = shape[1] // 2
    x = (random.standard_normal(shape) * 3 + 5).astype(np.float32)
    weight, bias = (random.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    grouped = x.astype(float).reshape(shape[0], groups, -1)
    deviation = np.sqrt(grouped.var(-1, keepdims=True) + 1e-6)
    axes = (1, -1, *[1] * (len(shape) - 2))
    normed = ((grouped - grouped.mean(-1, keepdims=True)) / deviation).reshape(shape)
    normed = normed * weight.reshape(axes) + bias.reshape(axes)
    assert_near(calls.group_norm(run, x, weight, bias, 1e-6, groups, name, tasks=2), FORMULAS[name](normed))
    scale, shift = calls.group_norm_factors(run, x, weight, bias, 1e-6, groups, tasks=2)
    spread = (*shape[:2], *[1] * (len(shape) - 2))
    assert_near(x.astype(float) * scale.reshape(spread) + shift.reshape(spread), normed)
