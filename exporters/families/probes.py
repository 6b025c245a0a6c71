"""Random values on which a fused form is compared with the module it replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.families.unsupported import SUPPORTED, UnsupportedModule

#: How far a fused form may be from the module it replaces, relative to the largest value or to 1.
PROBE_TOLERANCE = 2e-6


def random(*shape: int) -> Tensor:
    """float32, the same values for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest value or to 1; infinite for other shapes."""
    if expected.shape != got.shape:
        return float("inf")
    return (expected.float() - got.float()).abs().max().item() / max(1.0, expected.float().abs().max().item())


def same(path: str, module: nn.Module, expected: Tensor, got: Tensor) -> None:
    """Raises UnsupportedModule unless both agree."""
    found = error(expected, got)
    if not found <= PROBE_TOLERANCE:
        raise UnsupportedModule(
            f"{type(module).__name__} computes something else than its fused form (difference {found:.2g})",
            where=path,
            way_out=SUPPORTED,
        )
