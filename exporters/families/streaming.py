"""transformers' own model with its weights read one decoder layer at a time, and a visit to each layer as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from exporters.student import Student

#: Full name of a parameter or persistent buffer -> float32 values.
Read = Callable[[str], Tensor]
#: Tokens that a module computes at a time, so that what it holds of them besides its weights stays small.
TOKENS = 2048


class Call:
    """One call that the model makes of a module, with [n, L] or [n, L, H] as its first argument; it can be repeated."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module, self._args, self._kwargs = module, args, kwargs
        count, length = args[0].shape[:2]
        each = max(1, TOKENS // length)
        #: The rows that are computed at a time.
        self.slices = [slice(start, min(start + each, count)) for start in range(0, count, each)]

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """The module's output, for another first argument if one is given."""
        return torch.cat([self.run_rows(rows, hidden) for rows in self.slices])

    def run_rows(self, rows: slice, hidden: Tensor | None = None) -> Tensor:
        """The same for some of the rows; hooks of the modules inside it are called, its own are not."""
        args, kwargs = self.arguments(rows)
        out = self.module.forward(args[0] if hidden is None else hidden[rows], *args[1:], **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def arguments(self, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for some of the rows: of tensors that have as many (a mask may have one for all of them)."""
        count = self._args[0].shape[0]

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            per_row = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count
            return value[rows] if per_row else value

        return tuple(map(cut, self._args)), {key: cut(value) for key, value in self._kwargs.items()}


Visit = Callable[[str, Call], None]


def empty_model(student: Student, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with its parameters on the meta device; its buffers, such as RoPE frequencies, have their values."""
    handle = register_module_parameter_registration_hook(
        lambda module, name, parameter: None if parameter is None else on_meta(parameter)
    )
    try:
        return AutoModelForCausalLM.from_config(student.library_config(), dtype=dtype).eval()
    finally:
        handle.remove()


def on_meta(parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape and dtype without values."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def student_reader(student: Student) -> Read:
    """Reads a student's own parameters and buffers, tied ones too."""
    return lambda name: student.parameter(student.tied.get(name, name))


@torch.no_grad()
def walk(model: PreTrainedModel, ids: Tensor, read: Read, visit: Visit = lambda name, call: None) -> Tensor:
    """One forward pass without the head; the weights of an embedding, a layer or a norm are there while it runs.

    Args:
        model: of `empty_model`.
        ids: [n, L].
        visit: called with the name of each of the model's parts and its call, before it runs. It may run the part
            and change its weights; what the part then computes is what the next one gets.

    Returns:
        The hidden states behind the final norm [n, L, H].
    """
    base = model.base_model
    names = {module: name for name, module in model.named_modules()}
    whole: dict[nn.Module, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        load(module, names[module], read)
        call = Call(module, args, kwargs)
        visit(names[module], call)
        if len(call.slices) == 1:
            return None
        whole[module] = call.run()
        return call.arguments(slice(1))  # the model's own call shows no more than what the module returns

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        unload(module)
        if module not in whole:
            return None
        made = whole.pop(module)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles = []
    for part in parts(model):
        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave))
    try:
        return base(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


def parts(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Embedding, decoder layers and norms: what a forward pass without the head runs, each with weights of its own."""
    for module in model.base_model.children():
        for each in module if isinstance(module, nn.ModuleList) else (module,):
            if each.state_dict():
                yield each


class _Given(nn.Module):
    """Stands in the decoder's place: hidden states that are there already."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


@torch.no_grad()
def logits(model: PreTrainedModel, hidden: Tensor, read: Read) -> Iterator[Tensor]:
    """Logits [L, V] of one sample after the other, from hidden states [n, L, H]: the class scales or caps them."""
    prefix, head = model.base_model_prefix, model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    base = getattr(model, prefix)
    load(head, name, read)
    try:
        for row in hidden:
            setattr(model, prefix, _Given(row[None]))
            yield model(input_ids=torch.zeros(1, row.shape[0], dtype=torch.long), use_cache=False).logits[0]
    finally:
        setattr(model, prefix, base)
        unload(head)


def load(module: nn.Module, name: str, read: Read) -> None:
    """Gives a module of `empty_model` its values."""
    state = {key: read(f"{name}.{key}") for key in module.state_dict()}
    module.load_state_dict(state, assign=True)


def unload(module: nn.Module) -> None:
    """Back to the meta device, but for what was computed."""
    for key, parameter in list(module.named_parameters()):
        owner, _, last = key.rpartition(".")
        setattr(module.get_submodule(owner), last, on_meta(parameter))
