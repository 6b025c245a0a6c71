"""AWQ: channels that carry large activations are scaled up before their weights are rounded, and down before that.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv:2306.00978),
section 3.2: s = mean|x|^a, with a searched on a grid for the smallest squared error of the stage's outputs. The
scales leave no trace at run time: they are folded into the norm or the linear layer before (folding.py).

Written here because torchao's prototype (0.18) keeps the scales as an operation of the layer, and NNCF's (3.4) is part
of a compression of the whole model in memory; llm-compressor (0.14) asks for older releases of transformers and
compressed-tensors than the pinned ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.quantise import folding
from exporters.quantise.grids import Width, round_to_nearest
from exporters.quantise.layer import Layer, Stage, Statistics

#: Exponents that are tried; 0 is plain rounding, so the search never ends with more error than that has.
EXPONENTS = tuple(step / 20 for step in range(20))
#: The smallest mean |x| that counts, as a share of the largest.
_FLOOR = 1e-4


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs for inputs with second moments ``hessian`` [K,K]: trace(D H D^T)."""
    difference = (rounded - weight).to(hessian.dtype)
    return float(((difference @ hessian) * difference).sum())


def search(layer: Layer, stage: Stage, found: Statistics, width: Width) -> Tensor | None:
    """The stage's scales [channels], or None where plain rounding is best or nothing before can be scaled."""
    count = folding.channels(layer, stage)
    if not count:
        return None
    mean = folding.gather(layer, stage, found.mean, count)
    mean = mean.clamp(min=max(float(mean.max()) * _FLOOR, torch.finfo(torch.float32).tiny))
    weights = [layer.weight(name) for name in stage.linears]
    best, chosen = float("inf"), None
    for exponent in EXPONENTS:
        scales = mean**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        columns = folding.spread(layer, stage, scales)
        error = sum(
            output_error(weight, round_to_nearest(weight * columns, width).dequantize() / columns, found.hessian)
            for weight in weights
        )
        if error < best:
            best, chosen = error, scales if exponent else None
    return chosen


def quantise_layer(layer: Layer, width: Width) -> None:
    """AWQ of one decoder layer: scales are found stage by stage and folded, then every weight is rounded."""
    stages = layer.stages()
    for stage in stages:
        scales = search(layer, stage, layer.statistics([stage])[stage], width)
        if scales is not None:
            folding.fold(layer, stage, scales)
    for stage in stages:
        for name in stage.linears:
            layer.put(name, round_to_nearest(layer.weight(name), width), width)
