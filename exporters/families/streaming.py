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


class Call:
    """One call that the model makes of a module: ``run`` repeats it, on another first argument if one is given."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module, self._kwargs = module, kwargs
        self.hidden, *self._args = args

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """The module's output; hooks of the modules inside it are called, its own are not."""
        out = self.module.forward(self.hidden if hidden is None else hidden, *self._args, **self._kwargs)
        return out[0] if isinstance(out, tuple) else out


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

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        load(module, names[module], read)
        visit(names[module], Call(module, args, kwargs))

    def leave(module: nn.Module, *_: Any) -> None:
        unload(module)

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
