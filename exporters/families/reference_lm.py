"""The parity reference of a language model: transformers' own unmodified modules, their weights read as they run.

A whole model in float64 is sixteen times a 4-bit checkpoint. Here every parameter stays on the meta device; a forward
hook reads those of a module from the checkpoint just before it runs, and another lets them go. Embeddings get the rows
that are looked up, and a plain linear head is computed a slice of its rows at a time, so the largest thing in memory
is one matrix of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.families.activation_hooks import round_inputs
from exporters.families.modules import takes_positions
from exporters.families.streaming import empty_model, on_meta

if TYPE_CHECKING:
    from exporters.student import Student

#: Rows of the head that are multiplied with at once: 128 MB of a hidden size of 1024 in float64.
HEAD_ROWS = 1 << 14

#: Rows of a tensor -> their values, in any float dtype.
Values = Callable[[slice | Tensor], Tensor]
#: Name of a parameter or buffer -> where its values are read.
Open = Callable[[str], Values]
ALL = slice(None)


def streamed_reference(student: Student, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' unmodified model with the student's dequantised weights: in float32 the parity reference.

    It is called as any other; what it holds between two calls is its buffers.
    """
    model = empty_model(student, dtype)
    opened = opener(student)
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(_SlicedHead(head, f"{names[head]}.", opened))
    for module, name in names.items():
        if module is head and type(head) is nn.Linear:
            continue
        stored = [(part, f"{name}.{part}" if name else part) for part, _ in module.named_parameters(recurse=False)]
        if isinstance(module, nn.Embedding) and not takes_positions(module):
            module.padding_idx = None  # of a table with all its rows; it matters to gradients alone
            module.register_forward_pre_hook(_rows_needed(stored, opened))
        elif stored:
            module.register_forward_pre_hook(_materialise(stored, opened))
        if stored:
            module.register_forward_hook(_release(stored))
    for name, buffer in model.named_buffers():
        if name in student.tensors:
            buffer.copy_(opened(name)(ALL))
    round_inputs(model, student.activations)
    return model


def opener(student: Student) -> Open:
    """Finds a student's tensors: float ones as they are stored, quantised ones dequantised to float32."""

    def opened(name: str) -> Values:
        name = student.tied.get(name, name)
        module = name.removesuffix(".weight")
        if module in student.quantized:
            tensor = student.quantized[module]
            return lambda rows: torch.from_numpy((tensor if rows is ALL else tensor.take(rows)).dequantize())
        # In the stored dtype where that is one tensor: an embedding's few rows, a head's slices.
        values = student.tensor(name) if name in student.tensors else student.parameter(name)
        return lambda rows: values[rows]

    return opened


class _SlicedHead(nn.Module):
    """``x @ W.T + bias`` of a linear layer on the meta device, HEAD_ROWS rows of W at a time."""

    def __init__(self, head: nn.Linear, prefix: str, opened: Open) -> None:
        super().__init__()
        self.out_features, self._biased = head.out_features, head.bias is not None
        self._prefix, self._opened = prefix, opened

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        weight = self._opened(f"{self._prefix}weight")
        bias = self._opened(f"{self._prefix}bias") if self._biased else None
        for start in range(0, self.out_features, HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, self.out_features))
            term = None if bias is None else bias(rows).to(x.dtype)
            out[..., rows] = F.linear(x, weight(rows).to(x.dtype), term)
        return out


def _materialise(stored: list[tuple[str, str]], opened: Open) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        for part, name in stored:
            _set(module, part, opened(name)(ALL))

    return hook


def _rows_needed(stored: list[tuple[str, str]], opened: Open) -> Callable[..., tuple[Tensor, ...]]:
    """Gives an embedding the rows of its ids, and the ids as their places among them."""
    [(part, name)] = stored

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, places = args[0].unique(return_inverse=True)
        _set(module, part, opened(name)(rows))
        return (places, *args[1:])

    return hook


def _release(stored: list[tuple[str, str]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part, _ in stored:
            setattr(module, part, on_meta(getattr(module, part)))

    return hook


def _set(module: nn.Module, part: str, values: Tensor) -> None:
    """The parameter with these values, in the dtype that the model computes in."""
    setattr(module, part, nn.Parameter(values.to(getattr(module, part).dtype), requires_grad=False))
