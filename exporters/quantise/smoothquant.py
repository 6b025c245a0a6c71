"""SmoothQuant: outliers of activations are moved into the weights, channel by channel, so that int8 holds both.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv:2211.10438), equation 4: s = max|x|^a / max|w|^(1-a), for the linear layers behind a norm, which takes 1/s.

Written here because torchao's prototype (0.18) keeps the scales as an operation of the layer rather than in the norm.
"""

from __future__ import annotations

import torch

from exporters.quantise import folding
from exporters.quantise.grids import Width, round_to_nearest
from exporters.quantise.layer import Layer

#: a of the paper: how much of the difficulty goes into the weights.
STRENGTH = 0.5
#: The smallest maximum that counts.
_FLOOR = 1e-5


def smoothing(largest: torch.Tensor, weights: list[torch.Tensor], strength: float = STRENGTH) -> torch.Tensor:
    """Scales [K] of an input whose largest magnitudes are ``largest`` [K] and the weights [N,K] that read it."""
    heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return largest.clamp(min=_FLOOR) ** strength / heaviest.clamp(min=_FLOOR) ** (1 - strength)


def quantise_layer(layer: Layer, width: Width) -> None:
    """SmoothQuant of one decoder layer: the stages behind a norm are smoothed, then every weight is rounded."""
    stages = layer.stages()
    for stage, found in layer.statistics(stages, moments=False).items():
        if stage.norm is not None:
            weights = [layer.weight(name) for name in stage.linears]
            folding.fold(layer, stage, smoothing(found.largest, weights))
    for stage in stages:
        for name in stage.linears:
            layer.put(name, round_to_nearest(layer.weight(name), width), width)
