"""Snake activation, the periodic nonlinearity of neural audio codecs (Ziyin et al., 2020).

The published form is x + sin(alpha * x)^2 / alpha. With z = alpha * x it is (z + sin(z)^2) / alpha, and both scalings
belong to the convolutions around it (exporters/families/audio_codec.py folds them), so this is what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.ops._registry import fused_op


@fused_op({})
def snake(z: Tensor) -> Tensor:
    """``z + sin(z)^2``, element by element."""
    wave = torch.sin(z)
    return z + wave * wave
