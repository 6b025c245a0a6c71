"""Declares fused ops once: the reference is real mathematics, everything else is derived from it.

A fused op is an opaque node in the captured Program. Its reference serves as the eager implementation, as the
shape function (it runs on fake tensors) and as the decomposition of every backend that has no lowering for it,
so the five can never drift apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

NAMESPACE = "edge"
#: Domain of the ONNX nodes that a pass spells out in standard operators.
BUILD = "edge.build"

#: name of a lowering's target -> what it emits; a target is a form of a backend, e.g. "onnx/fused"
Lowerings = Mapping[str, Callable]


@dataclass(frozen=True)
class FusedOp:
    """One fused op.

    Attributes:
        name: name in the ``edge`` namespace.
        reference: typed eager function in plain PyTorch; outputs never alias inputs.
        lowerings: target -> decomposition that re-expresses the op in that target's own form.
        supports: (target, arguments of the node) -> reason why the lowering cannot take it, or None.
    """

    name: str
    reference: Callable
    lowerings: Lowerings
    supports: Callable[..., str | None]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The operator as it appears in an exported graph."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args, **kwargs):
        return self.overload(*args, **kwargs)

    def decomposition(self, target: str) -> Callable:
        """The lowering for ``target`` where it supports the arguments, else the reference."""
        lowering = self.lowerings.get(target)
        if lowering is None:
            return self.reference

        def decompose(*args, **kwargs):
            chosen = self.reference if self.supports(target, *args, **kwargs) else lowering
            return chosen(*args, **kwargs)

        return decompose


REGISTRY: dict[str, FusedOp] = {}


def _supports_all(target: str, *args, **kwargs) -> None:
    return None


def fused_op(
    lowerings: Lowerings, supports: Callable[..., str | None] = _supports_all
) -> Callable[[Callable], FusedOp]:
    """Registers the decorated reference as ``edge::<its name>`` with its fake and its lowerings."""

    def register(reference: Callable) -> FusedOp:
        name = reference.__name__
        library_op = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=())
        library_op.register_fake(_once_for_each_shape(reference))
        REGISTRY[name] = FusedOp(name, reference, dict(lowerings), supports)
        return REGISTRY[name]

    return register


def _once_for_each_shape(reference: Callable) -> Callable:
    """The shape function that runs ``reference`` once in each tracing for arguments that differ in values alone.

    The layers of a decoder are alike, and PyTorch remembers shapes of its own operators only.
    """
    found: WeakKeyDictionary[FakeTensorMode, dict[tuple, Any]] = WeakKeyDictionary()

    def fake(*args, **kwargs):
        given = (*args, *kwargs.values())
        mode = next((each.fake_mode for each in given if isinstance(each, FakeTensor)), None)
        if mode is None:
            return reference(*args, **kwargs)
        known, key = found.setdefault(mode, {}), (*map(described, given), *kwargs)
        if key not in known:
            known[key] = tree_map(layout, reference(*args, **kwargs))
        return tree_map(operator.call, known[key])

    return fake


def described(argument: Any) -> tuple:
    """What the shape of an operator's result can depend on; a symbolic size is its expression."""
    if not isinstance(argument, torch.Tensor):
        return type(argument), str(argument)
    sizes = (*argument.shape, "strides", *argument.stride())
    return torch.Tensor, argument.dtype, argument.device, *map(str, sizes)


def layout(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes an empty tensor like ``tensor``, which it does not keep."""
    return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
