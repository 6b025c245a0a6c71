"""Rounded activations in the parity reference: transformers' own layers, behind forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporters.activations import Activation
from exporters.families.unsupported import UnsupportedModule


def round_inputs(model: nn.Module, activations: Mapping[str, Activation]) -> list[RemovableHandle]:
    """Has each module of ``activations`` round its input as the checkpoint says, in the dtype that it computes in.

    Returns:
        What takes the rounding away again.

    Raises:
        UnsupportedModule: a module that the library does not compute by itself, as one of a mixture's experts.
    """
    modules = dict(model.named_modules())
    handles = []
    for name, activation in activations.items():
        if name not in modules:
            raise UnsupportedModule(
                f"its input is rounded ({activation}), but transformers computes it together with others",
                where=name,
                way_out="Quantise the experts' weights alone",
            )
        handles.append(modules[name].register_forward_pre_hook(_hook(activation)))
    return handles


def _hook(activation: Activation) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (activation.reference(args[0]), *args[1:])

    return hook
