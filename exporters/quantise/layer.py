"""One decoder layer while it is quantised: its linear layers, what they are fed, and what becomes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
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


class _Seen(Exception):
    """Nothing of the layer is still to be looked at: what is left of its run would be thrown away."""


class _Sums:
    """Statistics while they are gathered, some rows after the others."""

    def __init__(self, moments: bool) -> None:
        self._moments, self._count = moments, 0

    def add(self, rows: Tensor) -> None:
        """``rows`` [tokens, K]."""
        if not self._count:
            width = rows.shape[1]
            self._hessian = torch.zeros(width, width, dtype=torch.double) if self._moments else torch.zeros(0)
            self._sum, self._largest = torch.zeros(width, dtype=torch.double), torch.zeros(width)
        self._count += len(rows)
        for part in rows.split(_CHUNK):
            if self._moments:
                self._hessian += part.T @ part
            self._sum += part.abs().sum(0)
            self._largest = torch.maximum(self._largest, part.abs().amax(0))

    def statistics(self) -> Statistics:
        """Of all that was added."""
        return Statistics(self._hessian / self._count, (self._sum / self._count).float(), self._largest)


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
        self._run(handles, self._call.slices[0])
        found: dict[int, list[str]] = {}
        for name, value in inputs.items():
            found.setdefault(id(value), []).append(name)
        source = {id(value): name for name, value in norms.items()}
        return [Stage(tuple(names), source.get(key)) for key, names in found.items()]

    def statistics(self, stages: Iterable[Stage], moments: bool = True) -> dict[Stage, Statistics]:
        """Runs the layer, with the weights that it has by now, as far as the last of the stages; without ``moments``
        there are no second moments."""
        found = {stage: _Sums(moments) for stage in stages}

        def watch(stage: Stage, rows: slice, waiting: set[Stage]) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found[stage].add(self._kept_rows(args[0], rows))
                waiting.discard(stage)
                if not waiting:
                    raise _Seen

            return hook

        for rows in self._call.slices:
            waiting = set(found)
            first = {stage: self._linears[stage.linears[0]] for stage in found}
            with suppress(_Seen):
                self._run([m.register_forward_pre_hook(watch(s, rows, waiting)) for s, m in first.items()], rows)
        return {stage: sums.statistics() for stage, sums in found.items()}

    def output(self) -> Tensor:
        """What the layer computes with the weights that it has by now, at the kept positions of its first rows
        [tokens, H]."""
        rows = self._call.slices[0]
        return self._kept_rows(self._call.run_rows(rows), rows)

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

    def _run(self, handles: list[Any], rows: slice) -> None:
        try:
            self._call.run_rows(rows)
        finally:
            for handle in handles:
                handle.remove()

    def _kept_rows(self, values: Tensor, rows: slice) -> Tensor:
        """[tokens, K] of the kept positions among ``rows``."""
        kept = self._kept[rows]
        return values[kept] if values.shape[:2] == kept.shape else values.flatten(0, -2)
