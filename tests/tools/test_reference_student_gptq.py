"""GPTQ against its baseline, and the forms of the distillation loss."""

import pytest
import torch

from tools.reference_student import gptq, quantize
from tools.reference_student.student import distance


@pytest.fixture
def layer():
    """A linear layer whose inputs are correlated, as activations are."""
    torch.manual_seed(3)
    inputs = torch.randn(512, 64) @ torch.randn(64, 64) * 0.2
    return torch.randn(48, 64) * 0.1, inputs


def test_gptq_loses_less_of_the_output_than_rounding(layer):
    weight, inputs = layer
    found = gptq.gptq(weight, inputs.T @ inputs / len(inputs), 4, 32)
    plain = gptq.round_to_nearest(weight, 4, 32)
    lost = [(inputs @ (grid.dequantize() - weight).T).square().mean() for grid in (found, plain)]
    assert lost[0] < 0.8 * lost[1]


def test_gptq_with_independent_inputs_is_rounding(layer):
    """Given a diagonal Hessian no error can be repaid, so both take the same codes."""
    weight, _ = layer
    found, plain = gptq.gptq(weight, torch.eye(64), 4, 32), gptq.round_to_nearest(weight, 4, 32)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


def test_an_input_that_is_never_used_does_not_break_gptq(layer):
    weight, inputs = layer
    inputs[:, 5] = 0
    grid = gptq.gptq(weight, inputs.T @ inputs / len(inputs), 4, 32)
    assert torch.isfinite(grid.dequantize()).all()


def test_scales_survive_narrowing_to_float16(layer):
    weight, _ = layer
    for grid in (gptq.channel_grid(weight), gptq.round_to_nearest(weight, 4, 32)):
        assert torch.equal(grid.scales.half().float(), grid.scales)
        assert (grid.scales > 0).all()


def test_a_row_of_zeros_keeps_a_usable_scale():
    grid = gptq.channel_grid(torch.zeros(2, 32))
    assert torch.equal(grid.dequantize(), torch.zeros(2, 32))


def test_what_is_written_reads_back(layer):
    weight, inputs = layer
    grid = gptq.gptq(weight, inputs.T @ inputs / len(inputs), 4, 32)
    tensors = quantize.compress("int4", {"model.layers.0.mlp.up_proj": grid})
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].shape == (48, 8)
    assert tensors["model.layers.0.mlp.up_proj.weight_zero_point"].shape == (6, 2)


@pytest.mark.parametrize("form", ["kl", "logit-mse"])
def test_distance_is_zero_for_equal_distributions_and_positive_otherwise(form):
    torch.manual_seed(0)
    logits = torch.randn(5, 11)
    shifted = distance(logits + 3.0, logits, form, 2.0)
    assert torch.allclose(shifted, torch.zeros(5), atol=1e-5)
    assert (distance(torch.randn(5, 11), logits, form, 2.0) > 1e-3).all()
