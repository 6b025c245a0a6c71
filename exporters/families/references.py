"""The discretizers through their own libraries: what golden outputs are computed with, and on which inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.families import audio_codec, image_vq
from exporters.student import Modality


@dataclass(frozen=True)
class Reference:
    """One class of discretizer.

    Attributes:
        decode: (model, codes) -> signal, as the library does it.
        encode: (model, signal) -> codes int32, as the library does it.
        signal: (samples or None, modality, scale) -> an input of the encoder; scale 1 is one signal.
        scales: sizes of the golden cases; the first is what a runtime decodes, the last was not seen at export.
    """

    decode: Callable[[nn.Module, Tensor], Tensor]
    encode: Callable[[nn.Module, Tensor], Tensor]
    signal: Callable[[Tensor | None, Modality, float], Tensor]
    scales: tuple[float, ...]


def _images(samples: Tensor | None, modality: Modality, scale: float) -> Tensor:
    """float [scale, C, H, W], normalised; samples are uint8 [n, h, w] or [n, h, w, C]."""
    constants = modality.preprocessing
    height, width = constants["size"]
    channels, count = constants["channels"], round(scale)
    if samples is None:
        coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    else:
        rows = samples[torch.arange(count) % len(samples)].float() / 255
        coarse = (rows[:, None] if rows.dim() == 3 else rows.movedim(-1, 1)).expand(-1, channels, -1, -1)
    pixels = F.interpolate(coarse, (height, width), mode="bilinear")
    mean, std = (torch.tensor(constants[key])[:, None, None] for key in ("mean", "std"))
    return ((pixels - mean) / std).contiguous()


def _audio(samples: Tensor | None, modality: Modality, scale: float) -> Tensor:
    """float [1, 1, L] with L a multiple of the hop length; samples are int16 [n, l], joined and repeated."""
    constants, frames = modality.preprocessing, modality.grid[0]
    hop = constants["samples"] // frames
    length = max(2, round(frames * scale)) * hop
    if samples is None:
        time = torch.arange(length) / constants["sample_rate"]
        wave = torch.sin(2 * torch.pi * (200 + 400 * time) * time)
    else:
        joined = samples.flatten().float() / 2**15
        wave = joined.repeat(-(-length // len(joined)))[:length]
    return (wave * constants["peak"] / wave.abs().max())[None, None].contiguous()


#: class of the discretizer -> its reference
REFERENCES: Mapping[str, Reference] = {
    "VQModel": Reference(image_vq.reference_decode, image_vq.reference_encode, _images, (1, 4, 6)),
    "DacModel": Reference(audio_codec.reference_decode, audio_codec.reference_encode, _audio, (1.0, 0.5, 1.5)),
}
