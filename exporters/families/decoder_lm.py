"""Decoder-only language models: transformers' own modules, with fused ops swapped in, captured as ``lm``.

Nothing is rewritten and nothing is monkeypatched. What changes enters through the library's points of extension:
the attention registry, a cache object, keyword arguments that transformers hands down to attention, and swaps of
whole leaf modules. Each swap is proven against the module it replaces, on random values, before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from exporters import passes
from exporters.families import modules
from exporters.families.activation_hooks import round_inputs
from exporters.families.attention import ATTENTION, Layer, StateCache, own_attention, read_layers, run
from exporters.families.matrices import Matrices
from exporters.families.swaps import Swap
from exporters.families.unsupported import SUPPORTED, UnsupportedModule
from exporters.program import Constant, Program, capture
from runtimes.bundle import StateSpec, TensorSpec

if TYPE_CHECKING:
    from exporters.student import Student


#: Name of a state -> its step for each channel, float32 [kv_heads, 1, D], in the order of the states.
CacheSteps = Mapping[str, np.ndarray]


#: What may be done with a table before rows of it are taken: all of them stay.
_WHOLE = frozenset((
    *(getattr(torch.ops.aten, name).default for name in ("repeat", "expand", "view", "reshape", "unsqueeze", "clone")),
    torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.aten.to.device,
))  # fmt: skip


class LanguageModel(nn.Module):
    """``forward(ids [1, S], last [1], *past) -> (logits [1, V] of the newest token, *present)``."""

    def __init__(self, model: PreTrainedModel, layers: tuple[Layer, ...], steps: CacheSteps | None = None):
        super().__init__()
        names = [] if steps is None else list(steps)
        for name in names:
            self.register_buffer(name, torch.empty(steps[name].shape))
        self._steps = names
        # The same attribute names as in transformers' class, so that the graph's names are the checkpoint's.
        for name, child in model.named_children():
            setattr(self, name, child)
        # The whole class is called: some families scale or cap the logits behind the head.
        self._causal, self._layers = modules.Shared(model), layers

    def forward(self, ids: Tensor, last: Tensor, *past: Tensor):
        scales = [self.get_buffer(name) for name in self._steps]
        cache = StateCache(self._layers, list(past), last, scales, own_attention(self._causal()))
        positions = last - (ids.shape[1] - 1) + torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
        logits = run(self._causal(), ids, positions[None], cache)
        return logits[:, -1], *cache.present


def build_reference(student: Student, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' unmodified model with the student's dequantised weights: in float32 the parity reference."""
    model = AutoModelForCausalLM.from_config(student.library_config(), dtype=dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():  # a tied one has one name here
            if name in student.tensors or name.removesuffix(".weight") in student.quantized or name in student.experts:
                tensor.copy_(student.parameter(name))
    round_inputs(model, student.activations)
    return model.eval()


def capture_lm(student: Student, capacity: int, steps: CacheSteps | None = None) -> Program:
    """Captures the student's language model with a KV cache of ``capacity`` positions.

    Args:
        steps: of an int8 cache (exporters/kv_cache.py), keys and values of every layer in turn; None keeps float32.

    Raises:
        UnsupportedModule: a module that the capture does not understand, by name.
    """
    config = student.library_config()
    fake = FakeTensorMode()
    model = _fake_model(config, fake)
    matrices = Matrices(student, fake)
    swap = Swap(matrices, capacity)
    swap.model(model)
    layers = read_layers(model, capacity, fake)
    states = tuple(
        StateSpec(
            f"{kind}_{i}",
            "float32" if steps is None else "int8",
            (1, layer.kv_heads, capacity, layer.width),
            f"past_{kind}_{i}",
            f"present_{kind}_{i}",
        )
        for i, layer in enumerate(layers)
        for kind in ("key", "value")
    )
    with fake:
        examples = (
            torch.zeros(1, 3, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            *(torch.zeros(state.shape, dtype=getattr(torch, state.dtype)) for state in states),
        )
        whole = LanguageModel(model, layers, steps)
    program = capture(
        "lm",
        whole,
        examples,
        {"ids": {1: "S"}},
        outputs=(TensorSpec("logits", "float32", (1, config.vocab_size)),),
        names=("ids", "last", *(s.input for s in states)),
        states=states,
        constants=matrices.constants | {name: Constant.of(values) for name, values in (steps or {}).items()},
        inherited=matrices.inherited,
    )
    _check_loaded(program)
    _check_positions(program, swap.by_position)
    return passes.apply(program, passes.PROGRAM)


def _fake_model(config: PreTrainedConfig, fake: FakeTensorMode) -> PreTrainedModel:
    """transformers' own model of a config with our attention, on tensors that take no memory.

    Families with attention of their own know no name of ours when they are made; they take their masks by it.
    """
    try:
        with fake, no_init_weights():  # some families look at what they initialise
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
            except KeyError:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
                model.config._attn_implementation = ATTENTION
    except Exception as error:  # its skeleton was built before: what is new is the attention
        raise UnsupportedModule(
            f"its attention is not one of the library's interface: {type(error).__name__}: {error}",
            where=f"model_type {config.model_type}",
            way_out=SUPPORTED,
        ) from error
    return model.eval()


def _check_loaded(program: Program) -> None:
    """Every weight and buffer that the graph reads has a value."""
    names = program.stored
    for node in program.exported.graph.find_nodes(op="placeholder"):
        if node.users and node.name in names and names[node.name] not in program.constants:
            raise UnsupportedModule(
                "is computed when the module is made, and the checkpoint has no value for it",
                where=names[node.name],
                way_out=SUPPORTED,
            )


def _check_positions(program: Program, tables: Sequence[str]) -> None:
    """Every table that is looked up by position is looked up by the positions that were given.

    A family that takes none counts from what its cache holds; it would be right for the first step alone.
    """
    graph, names = program.exported.graph, program.stored
    table_of: dict[torch.fx.Node, str] = {}
    positioned = {next(node for node in graph.nodes if node.op == "placeholder" and node.name == "last")}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name, "")
            if table := next((table for table in tables if name == table or name.startswith(f"{table}.")), None):
                table_of[node] = table
            continue
        if any(given in positioned for given in node.all_input_nodes):
            positioned.add(node)
            continue
        for given in node.all_input_nodes:
            if given not in table_of:
                continue
            if node.target not in _WHOLE:
                raise UnsupportedModule(
                    "is not looked up by the positions that the model is given, but by others that it counts itself",
                    where=table_of[given],
                    way_out=SUPPORTED,
                )
            table_of[node] = table_of[given]
