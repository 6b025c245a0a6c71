"""Rounded activations in the parity reference: transformers' own layers, behind forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from exporters.activations import Activation


def round_inputs(model: nn.Module, activations: Mapping[str, Activation]) -> None:
    """Has each module of ``activations`` round its input as the checkpoint says, in the dtype that it computes in."""
    for name, activation in activations.items():
        model.get_submodule(name).register_forward_pre_hook(_hook(activation))


def _hook(activation: Activation) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (activation.reference(args[0]), *args[1:])

    return hook
