"""Grids against a search over all codes, GPTQ against the solution that it is an efficient form of."""

import numpy as np
import pytest
import torch

from exporters.quantise.gptq import gptq
from exporters.quantise.grids import Grid, Width, fit, half_scale, round_to, round_to_nearest
from tests.exporters.quantise_layers import correlated

WIDTHS = (Width(4, 16), Width(4, 32), Width(8, 16), Width(8))


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (5, 64), (33, 96)])
def test_every_code_is_the_nearest_of_all(width, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    grid = round_to_nearest(weight, width)
    group = width.columns(shape[1])
    scale = np.repeat(grid.scales.numpy().astype(np.float64), group, 1)
    zero = np.repeat(grid.zero_points.numpy().astype(np.float64), group, 1)
    codes = np.arange(-(2 ** (width.bits - 1)), 2 ** (width.bits - 1))
    distance = np.abs((codes[:, None, None] - zero) * scale - weight.double().numpy())
    chosen = np.abs((grid.codes.numpy() - zero) * scale - weight.double().numpy())
    assert (chosen <= distance.min(0) + 1e-6).all()


@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_the_canonical_form_stands_for_the_same_weights(width):
    weight, _ = correlated()
    grid = round_to_nearest(weight, width)
    tensor = grid.tensor(width, "here")
    assert np.array_equal(tensor.dequantize(), grid.dequantize().numpy())
    assert (tensor.zero_points is None) == (width.group is None)


def test_a_group_is_clipped_where_that_costs_less():
    torch.manual_seed(1)
    columns = torch.randn(64, 32)
    whole = half_scale((columns.amax(1) - columns.amin(1)) / 15)
    scale, zero = fit(columns, Width(4, 32))
    assert (scale[:, 0] < whole).any()
    plain = round_to(columns, whole[:, None], (-8 - columns.amin(1) / whole).round()[:, None], 4)[1]
    fitted = round_to(columns, scale, zero, 4)[1]
    assert (fitted - columns).square().sum() <= (plain - columns).square().sum()


def test_scales_survive_narrowing_to_float16():
    weight, _ = correlated()
    for width in WIDTHS:
        grid = round_to_nearest(weight, width)
        assert torch.equal(grid.scales.half().float(), grid.scales)
        assert (grid.scales > 0).all()


@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_a_row_of_zeros_keeps_a_usable_scale(width):
    assert torch.equal(round_to_nearest(torch.zeros(2, 32), width).dequantize(), torch.zeros(2, 32))


def obq(weight: torch.Tensor, hessian: torch.Tensor, width: Width, damping: float) -> np.ndarray:
    """Codes by the rule itself, in float64: round a column, then move the columns that are left to where the squared
    error of the outputs is smallest, and take it out of the inverse (Frantar et al. 2022, equations 2 and 3)."""
    work = weight.double().numpy().copy()
    moments = hessian.double().numpy() + damping * float(hessian.diagonal().mean()) * np.eye(len(hessian))
    inverse = np.linalg.inv(moments)
    codes = np.zeros(work.shape, np.int8)
    group = width.columns(work.shape[1])
    for column in range(work.shape[1]):
        if column % group == 0:
            scale, zero = fit(torch.from_numpy(work[:, column : column + group]).float(), width)
        code, value = round_to(torch.from_numpy(work[:, column : column + 1]).float(), scale, zero, width.bits)
        codes[:, column] = code[:, 0].numpy()
        error = (work[:, column] - value[:, 0].double().numpy()) / inverse[0, 0]
        work[:, column:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes


@pytest.mark.parametrize(
    ("width", "columns"),
    [(Width(8), 40), (Width(4, 16), 64), (Width(4, 48), 144), (Width(4, 32), 160), (Width(8), 200)],
)
def test_gptq_takes_the_codes_of_the_direct_solution(width, columns):
    weight, inputs = correlated(1024, columns, 12)
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    found = gptq(weight, hessian, width, 0.01).codes.numpy()
    assert (found == obq(weight, hessian, width, 0.01)).mean() > 0.999  # a tie may fall either way in float64


def test_gptq_loses_less_of_the_output_than_rounding():
    weight, inputs = correlated()
    width = Width(4, 32)
    found, plain = gptq(weight, inputs.T @ inputs / len(inputs), width), round_to_nearest(weight, width)
    lost = [(inputs @ (grid.dequantize() - weight).T).square().mean() for grid in (found, plain)]
    assert lost[0] < 0.8 * lost[1]


def test_gptq_with_independent_inputs_is_rounding():
    """Given a diagonal Hessian no error can be repaid, so both take the same codes."""
    weight, _ = correlated()
    found, plain = gptq(weight, torch.eye(64), Width(4, 32)), round_to_nearest(weight, Width(4, 32))
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


def test_an_input_that_is_never_used_does_not_break_gptq():
    weight, inputs = correlated()
    inputs[:, 5] = 0
    grid = gptq(weight, inputs.T @ inputs / len(inputs), Width(4, 32))
    assert isinstance(grid, Grid)
    assert torch.isfinite(grid.dequantize()).all()
