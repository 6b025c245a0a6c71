"""How a quantised layer's input is rounded before it is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """What ``edge::quantize_activation`` is told of one layer; its docstring explains the fields."""

    encoding: str
    group: int = 0
    symmetric: bool = True
    scale: float = 0.0
    zero_point: int = 0
    global_scale: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., K] rounded, through the fused op."""
        from exporters import ops

        return ops.quantize_activation(x, *self._arguments())

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain PyTorch."""
        from exporters import ops

        return ops.quantize_activation.reference(x, *self._arguments())

    def _arguments(self) -> tuple[str, int, bool, float, int, float]:
        return self.encoding, self.group, self.symmetric, self.scale, self.zero_point, self.global_scale

    def __str__(self) -> str:
        how = "static" if self.scale else f"per {f'{self.group} columns' if self.group else 'token'}"
        return f"{self.encoding} {how}"
