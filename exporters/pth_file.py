"""Weights in a .pth file: only as a zip of plain tensors, and only through torch's weights_only unpickler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporters.errors import WeightsError

if TYPE_CHECKING:
    import torch


def load_pth(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor of a state dict saved by torch.save. Raises WeightsError."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(str(error)[:300], where=str(path), way_out="Save it as safetensors") from error
