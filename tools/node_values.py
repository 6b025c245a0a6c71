"""A Program run node by node in PyTorch: every node's value, and what its noise is in another dtype."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Interpreter, Node

from exporters import ops
from exporters.program import Program

#: Share of a node's largest value by which an artifact may differ where no noise floor is larger: the export gate's
#: limit for float32; rounding of one float16 value; what int8 activations cost a matrix product.
LEAST = {"exact": 1e-4, "fp16": 2e-3, "fast": 5e-2}
#: mode of an artifact -> dtype that the reference's values are rounded to, for the noise of each node. What a fast
#: mode computes in is the vendor's choice: the coarsest that it may take.
ROUNDING = {"fp16": torch.float16, "fast": torch.bfloat16}
#: Factor on a node's own noise in the artifact's dtype.
FACTOR = 10


@dataclass(frozen=True)
class NodeValue:
    """A node's first result in float32, and the share of its largest value by which an artifact may differ."""

    value: np.ndarray
    limit: float


@dataclass(frozen=True)
class Difference:
    """A node that differs. `error` and `limit` are shares of the node's largest value; `what` says it in words."""

    node: str
    what: str
    error: float
    limit: float


class _Values(Interpreter):
    """Keeps the first result of every floating-point node; weights are loaded when a node reads them."""

    def __init__(self, program: Program, dtype: torch.dtype | None = None) -> None:
        super().__init__(program.exported.graph_module)
        signature = program.exported.graph_signature
        self._weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._weights |= signature.inputs_to_lifted_tensor_constants
        self._program, self._dtype = program, dtype
        self.values: dict[str, torch.Tensor] = {}

    def placeholder(self, target, args, kwargs):
        if target in self._weights:  # not among the arguments of `run`
            return torch.from_numpy(np.array(self._program.constants[self._weights[target]].load()))
        return super().placeholder(target, args, kwargs)

    def run_node(self, n: Node):
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        if self._dtype is not None:
            result = torch.utils._pytree.tree_map(self._rounded, result)
        first = result[0] if isinstance(result, tuple) else result
        if is_watched(n) and isinstance(first, torch.Tensor):
            self.values[n.name] = first
        return result

    def _rounded(self, value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self._dtype).to(value.dtype) if floating else value


def is_watched(node: Node) -> bool:
    """Whether a node computes floating-point values of its own: not a weight, and not a choice among results.

    Of the library's own operators with several results no backend says which of its values is the first one.
    """
    value = node.meta.get("val")
    ours = getattr(node.target, "namespace", "") == ops.NAMESPACE
    first = value[0] if ours and isinstance(value, (tuple, list)) else value
    return (
        node.op == "call_function"
        and isinstance(first, torch.Tensor)
        and first.is_floating_point()
        and (node.target is not operator.getitem)
    )


class Reference:
    """The program in PyTorch with the states of a session: `step` runs it and moves on."""

    def __init__(self, program: Program, mode: str) -> None:
        """``mode`` of the artifact that it is compared with decides on the dtype of the noise floor."""
        self._program, self._mode = program, mode
        self._states = {dtype: _zeros(program) for dtype in (None, ROUNDING.get(mode))}

    def step(self, feeds: Mapping[str, np.ndarray]) -> dict[str, NodeValue]:
        """Every watched node's value in one run.

        Args:
            feeds: the caller's inputs, "last" among them where the program has it.
        """
        exact = self._run(feeds, None)
        rounding = ROUNDING.get(self._mode)
        moved = exact if rounding is None else self._run(feeds, rounding)
        return {
            name: NodeValue(value, max(LEAST[self._mode], FACTOR * _relative(value, moved[name])))
            for name, value in exact.items()
        }

    @torch.no_grad()
    def _run(self, feeds: Mapping[str, np.ndarray], dtype: torch.dtype | None) -> dict[str, np.ndarray]:
        interpreter = _Values(self._program, dtype)
        inputs = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self._program.inputs]
        outputs = interpreter.run(*inputs, *self._states[dtype])
        if self._program.states:
            self._states[dtype] = list(outputs[-len(self._program.states) :])
        return {name: value.float().numpy() for name, value in interpreter.values.items()}


def _zeros(program: Program) -> list[torch.Tensor]:
    return [torch.zeros(state.shape, dtype=getattr(torch, state.dtype)) for state in program.states]


def _relative(reference: np.ndarray, result: np.ndarray) -> float:
    scale = float(np.abs(reference).max(initial=0))
    error = float(np.abs(result - reference).max(initial=0))
    return error / scale if scale else error


def compare(node: str, expected: Mapping[str, NodeValue], found: Mapping[str, np.ndarray]) -> Difference | None:
    """How an observed value differs from the reference's; None where it does not, or was not observed."""
    if node not in found or node not in expected:
        return None
    reference, limit = expected[node].value, expected[node].limit
    if found[node].size != reference.size:
        return None  # the backend made another value of it, such as the factors of a norm that the next node applies
    result = found[node].astype(np.float32).reshape(reference.shape)
    broken = ~np.isfinite(result) & np.isfinite(reference)
    if broken.any():
        largest = float(np.abs(reference).max())
        what = f"{int(broken.sum())} of {broken.size} values are infinite or NaN (the reference reaches {largest:.4g})"
        return Difference(node, what, float("inf"), limit)
    error = _relative(reference, result)
    if error <= limit:
        return None
    at = np.unravel_index(int(np.abs(result - reference).argmax()), reference.shape)
    what = f"{result[at]:.6g} instead of {reference[at]:.6g} at {[int(i) for i in at]}"
    return Difference(node, what, error, limit)


def blocks_of(program: Program) -> dict[str, list[str]]:
    """Path of a module -> its watched nodes, in the order of the graph.

    A block is a numbered module, such as "model.layers.2" or "decoder.up_blocks.0"; what stands between two of them is
    a block of the module it belongs to.
    """
    blocks: dict[str, list[str]] = {}
    for node in filter(is_watched, program.exported.graph.nodes):
        path = _path(node)
        blocks.setdefault(path or next(reversed(blocks), program.entry), []).append(node.name)
    return blocks


def _path(node: Node) -> str:
    """The node's module up to its first number, "" for one of the wrapper's own."""
    stack: Sequence[str] = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]
    parts = stack[-1].split(".") if stack else []
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts if number is None else parts[: number + 1])
