"""Random changes that keep the digit: small affine maps of images; shift, speed, gain and noise of sounds."""

import math

import torch
from torch.nn import functional as F


def images(batch: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """float [n,1,h,w] in 0..1 -> same shape, rotated (<=12 deg), scaled, sheared and shifted (<=2 px) at random."""
    count, size = batch.shape[0], batch.shape[-1]

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count) * 2 - 1) * limit * strength

    angle, shear = uniform(math.radians(12)), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.12), 1 + uniform(0.12)
    shift = 2 * 2.0 / size
    top = torch.stack([scale_x * angle.cos(), shear - angle.sin(), uniform(shift)], 1)
    bottom = torch.stack([angle.sin(), scale_y * angle.cos(), uniform(shift)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, align_corners=False)


def sounds(batch: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """float [n,1,L] -> same shape: speed 0.9-1.1, delay up to 80 ms, faint noise, then the peak restored."""
    count, length = batch.shape[0], batch.shape[-1]
    speed = 1 + (torch.rand(count) * 2 - 1) * 0.1 * strength
    delay = (torch.rand(count) * 640 - 64).clamp(min=0) * strength
    position = (torch.arange(length)[None] - delay[:, None]) * speed[:, None]
    left = position.floor().long()
    fraction = position - left
    valid = (left >= 0) & (left < length - 1)
    index = left.clamp(0, length - 2)
    source = batch[:, 0]
    moved = torch.where(
        valid, source.gather(1, index) * (1 - fraction) + source.gather(1, index + 1) * fraction, torch.zeros(())
    )
    noise = torch.randn(count, length) * (10 ** (-(torch.rand(count, 1) * 30 + 45) / 20)) * strength
    peak = batch.abs().amax(-1)
    moved = moved + noise
    return (moved * (peak / moved.abs().amax(-1, keepdim=True).clamp(min=1e-6)))[:, None]
