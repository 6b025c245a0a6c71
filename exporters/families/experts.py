"""A layer's experts, executed densely: every expert computes every row, weighted by the router's choice.

transformers keeps the experts of a layer in two parameters of three dimensions and calls them with the rows, the
router's choice and its weights; checkpoints hold a Linear for each expert (exporters/stored_names.py). Here the first
product of all experts is one matrix product, and so is the second where the weights are float, with the columns of the
experts side by side: sum_e w_e * (h_e @ D_e.T) is cat_e(w_e * h_e) @ cat_e(D_e).T.

A step reads the weights of every expert, not of the chosen ones alone: E / k times as many. ONNX Runtime has an
operator that reads those of the chosen ones; exporters/passes/fuse_experts.py puts it in the place of this form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from exporters import ops
from exporters.families.matrices import Matrices
from exporters.families.probes import PROBE_TOLERANCE, error, random, same
from exporters.families.unsupported import SUPPORTED, UnsupportedModule
from exporters.program import Constant

#: What transformers' decorator of experts says of a class -> what it must be.
_ARRANGEMENT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
#: Sizes of the small experts that the formula is tried on.
_SMALL = dict(hidden_size=16, intermediate_size=8, moe_intermediate_size=8)


class DenseExperts(nn.Module):
    """``forward(rows [T, H], choice [T, k], weights [T, k]) -> [T, H]``.

    Args:
        inner: linear layers that give, side by side, gate and up of every expert, [T, E*2I].
        outer: one linear layer from [T, E*I], or one for each expert from [T, I].
        gate: [.., 2I] -> [.., I].
        paired: the features of an expert's gate and up alternate, instead of all of up behind all of gate.
    """

    def __init__(
        self,
        inner: list[nn.Module],
        outer: list[nn.Module],
        experts: int,
        gate: Callable[[Tensor], Tensor],
        paired: bool = False,
    ):
        super().__init__()
        self.inner, self.outer = nn.ModuleList(inner), nn.ModuleList(outer)
        self.experts, self.gate, self.paired = experts, gate, paired

    def forward(self, rows: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        parts = [linear(rows) for linear in self.inner]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        each = joined.unflatten(-1, (self.experts, -1))
        if self.paired:
            each = each.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        weighted = self.gate(each) * shares(choice, weights, self.experts)
        if len(self.outer) == 1:
            return self.outer[0](weighted.flatten(1))
        # A loop, not a product in three dimensions: each expert's quantised weights are a matrix of their own.
        total = self.outer[0](weighted[:, 0])
        for index in range(1, self.experts):
            total = total + self.outer[index](weighted[:, index])
        return total


def shares(choice: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weight of every expert for every row, [T, E, 1], zero where it was not chosen."""
    chosen = choice.unsqueeze(-1) == torch.arange(experts, device=choice.device)
    return (chosen * weights.unsqueeze(-1)).sum(1).unsqueeze(-1)


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the experts of a layer in transformers' arrangement or in another."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def dense_experts(path: str, module: nn.Module, config: PreTrainedConfig, matrices: Matrices) -> DenseExperts:
    """What takes the place of ``module``, after the formula was compared with its own forward on small experts.

    Raises:
        UnsupportedModule: experts with biases, without gates, transposed or interleaved, or of another formula.
    """
    if others := [name for name, wanted in _ARRANGEMENT.items() if getattr(module, name, wanted) != wanted]:
        raise UnsupportedModule(
            f"the experts of {type(module).__name__} are of another arrangement ({', '.join(others)})",
            where=path,
            way_out=SUPPORTED,
        )
    rounded = [name for name in matrices.student.activations if name.startswith(f"{path}.") or _is_part(name, matrices)]
    if rounded:
        raise UnsupportedModule(
            f"{type(module).__name__} rounds the inputs of its experts ({rounded[0]}), which no dense form does",
            where=path,
            way_out="Quantise the experts' weights alone.",
        )
    _prove(path, module, config)
    experts, width, _ = module.gate_up_proj.shape
    inner, paired = _inner(path, module.gate_up_proj, matrices)
    outer = _outer(path, module.down_proj, matrices)
    return DenseExperts(inner, outer, experts, _gate(module, width), paired)


def _prove(path: str, module: nn.Module, config: PreTrainedConfig) -> None:
    small = copy.deepcopy(config)
    for key, value in _SMALL.items():
        if hasattr(small, key):
            setattr(small, key, value)
    small._experts_implementation = "eager"
    own = type(module)(small)
    experts, width, hidden = own.gate_up_proj.shape
    weights = {"gate_up_proj": random(experts, width, hidden), "down_proj": random(experts, hidden, width // 2)}
    rows, choice = random(5, hidden), torch.arange(10).reshape(5, 2) % experts
    shared = random(5, 2).abs()
    with torch.no_grad():
        expected = torch.func.functional_call(own, weights, (rows, choice, shared))
        inner = (rows @ weights["gate_up_proj"].reshape(-1, hidden).T).reshape(5, experts, width)
        weighted = _gate(module, width)(inner) * shares(choice, shared, experts)
        same(path, module, expected, torch.einsum("tei,ehi->th", weighted, weights["down_proj"]))


def _gate(module: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
    """The fused SwiGLU where it is that, else the module's own."""
    values = random(3, width)
    if error(module._apply_gate(values), ops.swiglu.reference(values)) <= PROBE_TOLERANCE:
        return ops.swiglu
    return module._apply_gate


def _inner(path: str, parameter: Tensor, matrices: Matrices) -> tuple[list[nn.Module], bool]:
    """The layers, and whether the rows of gate and up alternate in them.

    They do in a quantised matrix of all experts, as ONNX Runtime's operator wants them: codes are written once, for
    whatever form reads them.
    """
    name, (experts, width, hidden) = f"{path}.gate_up_proj", parameter.shape
    groups = matrices.student.experts.get(name)
    if groups is None:
        whole = matrices.float(name)
        rows = Constant(whole.dtype, (experts * width, hidden), lambda: whole.load().reshape(-1, hidden))
        return [matrices.linear_of(f"{path}.inner.0", rows)], False
    # Expert by expert, gate before up.
    sources = [_module(kind[index]) for index in range(experts) for kind in groups]
    if matrices.joinable(sources):
        paired = sources[0] in matrices.student.quantized and len(groups) == 2
        return [matrices.linear(f"{path}.inner.0", sources, bias=False, paired=paired)], paired
    return [matrices.linear(f"{path}.inner.{i}", [source], bias=False) for i, source in enumerate(sources)], False


def _outer(path: str, parameter: Tensor, matrices: Matrices) -> list[nn.Module]:
    name, (experts, hidden, width) = f"{path}.down_proj", parameter.shape
    shape = (hidden, experts * width)
    groups = matrices.student.experts.get(name)
    if groups is None:
        return [matrices.linear_of(f"{path}.outer.0", _beside(shape, matrices.float(name).load))]
    sources = [_module(source) for source in groups[0]]
    if any(source in matrices.student.quantized for source in sources):
        return [matrices.linear(f"{path}.outer.{index}", [source], bias=False) for index, source in enumerate(sources)]
    parts = [matrices.float(source) for source in groups[0]]
    return [matrices.linear_of(f"{path}.outer.0", _beside(shape, lambda: np.stack([part.load() for part in parts])))]


def _beside(shape: tuple[int, int], load: Callable[[], np.ndarray]) -> Constant:
    """[E, H, I] as [H, E*I]."""
    return Constant("float32", shape, lambda: np.ascontiguousarray(load().transpose(1, 0, 2)).reshape(shape))


def _is_part(module: str, matrices: Matrices) -> bool:
    """Whether the checkpoint's ``module`` is a matrix of some expert."""
    groups = matrices.student.experts.values()
    return any(f"{module}.weight" in group for kinds in groups for group in kinds)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
