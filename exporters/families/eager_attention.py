"""Attention that a family writes out by itself, read as it runs: what stands for keys, values and scores.

Some families (Falcon, GPT-J, CodeGen) do not call the library's attention interface but multiply, scale, mask and
normalise in their own forward. The cache hands them objects in the place of keys and values, which take part through
torch's own protocol (``__torch_function__``): ``softmax(q @ k.T * scale + mask) @ v`` is read step by step and becomes
the fused attention, and any other operation on keys, values or scores is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from exporters.families.unsupported import SUPPORTED, UnsupportedModule

#: Methods of a tensor that rearrange it, and what may be asked of it.
_REARRANGES = frozenset(("transpose", "permute", "reshape", "view", "contiguous"))
_ASKED = frozenset(("shape", "size", "dim", "ndim", "dtype", "device"))
_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm"))


class UnknownStep(UnsupportedModule, AttributeError):
    """Attention of a family's own takes a step that the fused form does not have."""


@dataclass(frozen=True)
class OwnAttention:
    """Stands for the module that attends: all that is known of it is its layer."""

    layer_idx: int


#: (module, query [1, H, S, D], key and value [1, KV, S, D], mask, scale, softcap) -> [1, S, H, D]
Attend = Callable[[OwnAttention, Tensor, Tensor, Tensor, Any, float, float], Tensor]


class _Stand:
    """What torch's functions and operators are called with in the place of a tensor."""

    module: OwnAttention
    what = ""

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        stand = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _Stand))
        return stand._step(function.__name__, args, kwargs or {})

    def _step(self, name: str, args: tuple, kwargs: dict) -> Any:
        raise self._refusal(name)

    def _refusal(self, name: str) -> UnknownStep:
        return UnknownStep(
            f"attention of its own does {name!r} with its {self.what}, which no fused form has (ALiBi, or the like)",
            where=f"layer {self.module.layer_idx}",
            way_out=SUPPORTED,
        )

    def __getattr__(self, name: str) -> Any:
        raise self._refusal(name)

    def to(self, dtype: torch.dtype) -> Self:
        if dtype != torch.float32:
            raise self._refusal(f"to({dtype})")
        return self


@dataclass(frozen=True)
class Rows(_Stand):
    """Keys or values [1, KV, S, D], in whatever arrangement the family has brought them."""

    module: OwnAttention
    rows: Tensor
    attend: Attend
    what = "keys or values"

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED:
            return getattr(self.rows, name)
        if name in _REARRANGES:
            return lambda *args, **kwargs: replace(self, rows=getattr(self.rows, name)(*args, **kwargs))
        raise self._refusal(name)

    def __rmatmul__(self, left: Any) -> Any:
        return self._step("matmul", (left, self), {})

    def _step(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name in _PRODUCTS and len(args) == 2 and isinstance(args[0], Tensor) and args[1] is self:
            return Scores(self.module, args[0], self)
        raise self._refusal(name)


@dataclass(frozen=True)
class Scores(_Stand):
    """``query @ keys * scale + mask`` [..., S, S], and whether softmax was taken of it."""

    module: OwnAttention
    query: Tensor
    keys: Rows
    scale: float = 1.0
    mask: Any = None
    normalised: bool = False
    what = "scores"

    def __mul__(self, factor: Any) -> Scores:
        # A mask that was added before is scaled with the rest: what it hides stays hidden.
        if self.normalised or isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
            raise self._refusal("mul")
        return replace(self, scale=self.scale * factor)

    def __truediv__(self, divisor: Any) -> Scores:
        if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not divisor > 0:
            raise self._refusal("div")
        return self * (1 / divisor)

    def __add__(self, mask: Any) -> Scores:
        if self.normalised or self.mask is not None or isinstance(mask, Tensor | int | float):
            raise self._refusal("add")
        return replace(self, mask=mask)

    def __matmul__(self, values: Any) -> Tensor:
        return self._step("matmul", (self, values), {})

    def _step(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "softmax" and kwargs.get("dim", args[1] if len(args) > 1 else None) == -1 and not self.normalised:
            return replace(self, normalised=True)
        if name == "dropout" and not kwargs.get("training", True):
            return self
        if name in _PRODUCTS and len(args) == 2 and args[0] is self and isinstance(args[1], Rows) and self.normalised:
            return self._attended(args[1])
        raise self._refusal(name)

    def _attended(self, values: Rows) -> Tensor:
        """What the product with the values gives, by the fused attention; the batch is 1, so heads are what is left."""
        steps, width = self.query.shape[-2:]
        query, keys, rows = (
            t.reshape(1, -1, steps, width) for t in (self.query, self.keys.rows.transpose(-1, -2), values.rows)
        )
        out = self.keys.attend(self.module, query, keys, rows, self.mask, self.scale, 0.0)
        return out.transpose(1, 2).reshape(self.query.shape)
