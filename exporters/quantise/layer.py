"""One decoder layer while it is quantised: its linear layers, what they are fed, and what becomes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters.families.streaming import Call
from exporters.quantise.grids import Grid, Width
from exporters.quantise.store import Fold, Store

#: Rows of a product that is summed in float64, so that a sum over many tokens keeps its digits.
_CHUNK = 1024


@dataclass(frozen=True)
class Stage:
    """Linear layers that read one and the same input, by their full names, and the norm that it comes from, if any."""

    linears: tuple[str, ...]
    norm: str | None


@dataclass(frozen=True)
class Statistics:
    """Of a stage's input over all kept positions: second moments float64 [K,K], and mean and largest |x|, [K]."""

    hessian: Tensor
    mean: Tensor
    largest: Tensor


class Layer:
    """A decoder layer whose weights are there, with the call that the model makes of it.

    Args:
        name: of the layer in the checkpoint.
        kept: bool [n, L], the positions that hold tokens.
        modules: names of the linear layers to quantise, of the whole model.
        head_width: channels of an attention head.
        store: takes what is made.
    """

    def __init__(
        self, name: str, call: Call, kept: Tensor, modules: Iterable[str], head_width: int, store: Store
    ) -> None:
        self.name, self._call, self._kept, self._head_width, self._store = name, call, kept, head_width, store
        prefix = f"{name}."
        self._linears = {m: call.module.get_submodule(m[len(prefix) :]) for m in modules if m.startswith(prefix)}

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self._head_width

    def has(self, name: str) -> bool:
        """Whether it is one of the layer's linear layers."""
        return name in self._linears

    def stages(self) -> list[Stage]:
        """In the order in which the layer runs them, found by running it."""
        inputs: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}

        def fed(name: str) -> Callable[..., None]:
            return lambda module, args: inputs.__setitem__(name, args[0])

        def made(name: str) -> Callable[..., None]:
            return lambda module, args, output: norms.__setitem__(name, output)

        handles = [module.register_forward_pre_hook(fed(name)) for name, module in self._linears.items()]
        for name, module in self._call.module.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                handles.append(module.register_forward_hook(made(f"{self.name}.{name}")))
        self._run(handles)
        found: dict[int, list[str]] = {}
        for name, value in inputs.items():
            found.setdefault(id(value), []).append(name)
        source = {id(value): name for name, value in norms.items()}
        return [Stage(tuple(names), source.get(key)) for key, names in found.items()]

    def statistics(self, stages: Iterable[Stage]) -> dict[Stage, Statistics]:
        """Runs the layer once, with the weights that it has by now."""
        found: dict[Stage, Statistics] = {}

        def watch(stage: Stage) -> Callable[..., None]:
            return lambda module, args: found.__setitem__(stage, _statistics(self._rows(args[0])))

        self._run([self._linears[stage.linears[0]].register_forward_pre_hook(watch(stage)) for stage in stages])
        return found

    def output(self) -> Tensor:
        """What the layer computes with the weights that it has by now, at the kept positions [tokens, H]."""
        return self._rows(self._call.run())

    def weight(self, name: str) -> Tensor:
        """float32 [N, K] of a linear layer."""
        return self._linears[name].weight.detach()

    def module(self, name: str) -> nn.Module:
        """A module of the layer by its full name."""
        return self._call.module.get_submodule(name[len(self.name) + 1 :])

    def put(self, name: str, grid: Grid, width: Width) -> None:
        """The quantised weight, which the layer computes with from now on."""
        self._linears[name].weight = nn.Parameter(grid.dequantize(), requires_grad=False)
        self._store.put(name, grid, width)

    def fold(self, parameter: str, fold: Fold) -> None:
        """An exact change of a float parameter, by its full name; the layer computes with it from now on."""
        owner, _, last = parameter[len(self.name) + 1 :].rpartition(".")
        module = self._call.module.get_submodule(owner)
        setattr(module, last, nn.Parameter(fold.apply(getattr(module, last).detach()), requires_grad=False))
        self._store.fold(parameter, fold)

    def _run(self, handles: list[Any]) -> None:
        try:
            self._call.run()
        finally:
            for handle in handles:
                handle.remove()

    def _rows(self, values: Tensor) -> Tensor:
        """[tokens, K] of the kept positions."""
        return values[self._kept] if values.shape[:2] == self._kept.shape else values.flatten(0, -2)


def _statistics(rows: Tensor) -> Statistics:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.double)
    for part in rows.split(_CHUNK):
        total += part.T @ part
    return Statistics(total / len(rows), rows.abs().mean(0), rows.abs().amax(0))
