"""Decoder-only language models: transformers' own modules, with fused ops swapped in, captured as ``lm``.

Nothing is rewritten and nothing is monkeypatched. What changes enters through the library's points of extension:
the attention registry, a cache object, keyword arguments that transformers hands down to attention, and swaps of
whole leaf modules. Each swap is proven against the module it replaces, on random values, before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from exporters import passes
from exporters.families import modules
from exporters.families.attention import ATTENTION, StateCache
from exporters.families.matrices import Matrices
from exporters.families.swaps import Swap
from exporters.program import Program, capture
from runtimes.bundle import StateSpec, TensorSpec

if TYPE_CHECKING:
    from exporters.student import Student


class LanguageModel(nn.Module):
    """``forward(ids [1, S], last [1], *past) -> (logits [1, V] of the newest token, *present)``."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        # The same attribute names as in transformers' class, so that the graph's names are the checkpoint's.
        self.model, self.lm_head = model.model, model.lm_head
        # The whole class is called: some families scale or cap the logits behind the head.
        self._causal = modules.Shared(model)

    def forward(self, ids: Tensor, last: Tensor, *past: Tensor):
        cache = StateCache(list(past), last)
        positions = last - (ids.shape[1] - 1) + torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
        logits = self._causal()(
            input_ids=ids,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            edge_cache=cache,
            logits_to_keep=1,
        ).logits
        return logits[:, -1], *cache.present


def build_reference(student: Student, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' unmodified model with the student's dequantised weights: in float32 the parity reference."""
    model = AutoModelForCausalLM.from_config(student.library_config(), dtype=dtype)
    state = {name: student.tensor(name).float() for name in student.tensors}
    for name, tensor in student.quantized.items():
        state[f"{name}.weight"] = torch.from_numpy(tensor.dequantize())
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


def capture_lm(student: Student, capacity: int) -> Program:
    """Captures the student's language model with a KV cache of ``capacity`` positions.

    Raises:
        UnsupportedModule: a module that the capture does not understand, by name.
    """
    config = student.library_config()
    fake = FakeTensorMode()
    with fake:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    matrices = Matrices(student, fake)
    Swap(matrices, capacity).model(model)

    layers, width = config.num_hidden_layers, _head_dim(config)
    shape = (1, config.num_key_value_heads, capacity, width)
    states = tuple(
        StateSpec(f"{kind}_{i}", "float32", shape, f"past_{kind}_{i}", f"present_{kind}_{i}")
        for i in range(layers)
        for kind in ("key", "value")
    )
    with fake:
        examples = (
            torch.zeros(1, 3, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            *(torch.zeros(shape) for _ in states),
        )
    program = capture(
        "lm",
        LanguageModel(model),
        examples,
        {"ids": {1: "S"}},
        outputs=(TensorSpec("logits", "float32", (1, config.vocab_size)),),
        names=("ids", "last", *(s.input for s in states)),
        states=states,
        constants=matrices.constants,
        inherited=matrices.inherited,
    )
    return passes.apply(program, passes.PROGRAM)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
