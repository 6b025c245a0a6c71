"""What the reference student's quantised packages hold, and the forms of the distillation loss."""

import pytest
import torch

from exporters.quantise.gptq import gptq
from exporters.quantise.grids import Width
from tests.exporters.quantise_layers import correlated
from tools.reference_student import quantize
from tools.reference_student.student import distance


def test_what_is_written_reads_back():
    weight, inputs = correlated()
    grid = gptq(weight, inputs.T @ inputs / len(inputs), Width(4, 32))
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
