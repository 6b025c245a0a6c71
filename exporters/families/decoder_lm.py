"""Decoder-only language models: transformers' own modules, with fused ops swapped in, captured as ``lm``.

Nothing is rewritten and nothing is monkeypatched. What changes enters through the library's points of extension:
the attention registry, a cache object, keyword arguments that transformers hands down to attention, and swaps of
whole leaf modules. Each swap is proven against the module it replaces, on random values, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from exporters import ops, passes
from exporters.blocks import PARTS, BlockLayout
from exporters.errors import ExportError
from exporters.families import modules
from exporters.program import Constant, Inherited, Program, capture
from runtimes.bundle import StateSpec, TensorSpec

if TYPE_CHECKING:
    from exporters.student import Student

#: joined projection -> its parts, in the order of their rows: one matrix product instead of several.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

#: RoPE types whose angles depend on the position alone, so that a table holds them.
TABLE_ROPE = ("default", "linear", "llama3", "yarn")

#: What transformers hands to every attention and what a causal one with a cache does not need.
_IGNORED = ("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal")

#: The way out of every refusal of a module.
SUPPORTED = (
    "Supported: decoders of Linear, RMSNorm, table RoPE and causal attention, as in Llama, Qwen2, Qwen3, Mistral."
)

_ATTENTION = "edge"
_PROBE_TOLERANCE = 2e-6


class UnsupportedModule(ExportError):
    """A module of the model is not one that can be exported faithfully."""


# --- attention and cache: the two objects transformers calls back -------------------------------------------------


class StateCache:
    """Hands key and value through unchanged: attention itself reads the past and writes the present."""

    is_compileable = False

    def __init__(self, past: list[Tensor], last: Tensor):
        self.past, self.present, self.last = past, list(past), last

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _edge_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    edge_cache=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """transformers' attention interface on top of ``edge::kv_attention``; query and key come with RoPE applied."""
    if unknown := sorted(name for name, value in kwargs.items() if name not in _IGNORED and value is not None):
        raise UnsupportedModule(
            f"attention takes {', '.join(unknown)}, which no fused form has",
            where=type(module).__name__,
            way_out=SUPPORTED,
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    rows = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
    at = 2 * module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out, edge_cache.present[at], edge_cache.present[at + 1] = ops.kv_attention(
        *rows,
        edge_cache.past[at],
        edge_cache.past[at + 1],
        edge_cache.last,
        None,
        None,
        heads,
        kv_heads,
        scale,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out, None


# With no mask function registered under this name transformers builds no mask: the op is causal by itself.
AttentionInterface.register(_ATTENTION, _edge_attention)


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


# --- building -----------------------------------------------------------------------------------------------------


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
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=_ATTENTION).eval()
    swap = _Swap(student, capacity, fake)
    swap.model(model)

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
        constants=swap.constants,
        inherited=swap.inherited,
    )
    return passes.apply(program, passes.PROGRAM)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class _Swap:
    """Replaces the leaf modules of a model of fake tensors, recording how each new weight is loaded."""

    def __init__(self, student: Student, capacity: int, fake: FakeTensorMode):
        self.student, self.capacity, self.fake = student, capacity, fake
        self.constants: dict[str, Constant] = {}
        self.inherited: dict[str, Inherited] = {}

    def _new(self, factory: Callable, *args, **kwargs):
        """Calls ``factory`` so that the tensors it makes take no memory."""
        with self.fake:
            return factory(*args, **kwargs)

    def model(self, model: PreTrainedModel) -> None:
        self._tied_head(model)
        for name, parent in list(model.named_modules()):
            for joined, parts in JOINED.items():
                if all(isinstance(getattr(parent, part, None), nn.Linear) for part in parts):
                    self._join(name, parent, joined, parts)
        for name, parent in list(model.named_modules()):
            for attribute, child in list(parent.named_children()):
                path = f"{name}.{attribute}" if name else attribute
                if isinstance(child, nn.Linear):
                    setattr(parent, attribute, self._linear(path, [path], child.bias is not None))
                elif isinstance(child, nn.Embedding):
                    setattr(parent, attribute, self._embedding(path))
                elif type(child).__name__.endswith("RMSNorm"):
                    setattr(parent, attribute, self._norm(path, child))
                elif type(child).__name__.endswith("RotaryEmbedding"):
                    setattr(parent, attribute, self._rope(path, child, model.config))
        self._rest(model)

    def _tied_head(self, model: PreTrainedModel) -> None:
        if not model.config.tie_word_embeddings:
            return
        path = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        embedding = self._embedding(path)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(modules.TiedHead(embedding.matrix))

    def _join(self, path: str, parent: nn.Module, joined: str, parts: tuple[str, ...]) -> None:
        sources = [f"{path}.{part}" for part in parts]
        linears = [getattr(parent, part) for part in parts]
        if len({linear.bias is None for linear in linears}) > 1 or not self._joinable(sources):
            return
        fused = self._linear(f"{path}.{joined}", sources, linears[0].bias is not None)
        setattr(parent, joined, fused)
        start = 0
        for part, linear in zip(parts, linears, strict=True):
            setattr(parent, part, modules.LinearSlice(fused, start, start + linear.out_features))
            start += linear.out_features

    def _joinable(self, sources: list[str]) -> bool:
        """Exact only where all parts are float, or share bits, block and the presence of zero points."""
        quantized = [self.student.quantized.get(source) for source in sources]
        if all(tensor is None for tensor in quantized):
            return True
        if any(tensor is None for tensor in quantized):
            return False
        return len({BlockLayout.of(tensor, sources[0]) for tensor in quantized}) == 1

    def _linear(self, path: str, sources: list[str], bias: bool) -> modules.FusedLinear:
        matrix = self._matrix(f"{path}.matrix", sources)
        parameter = None
        if bias:
            loads = [self._float(f"{source}.bias") for source in sources]
            rows = sum(c.shape[0] for c in loads)
            parameter = self._new(nn.Parameter, torch.empty(rows), requires_grad=False)
            self.constants[f"{path}.bias"] = _concatenated(loads)
        return modules.FusedLinear(matrix, parameter)

    def _embedding(self, path: str) -> modules.FusedEmbedding:
        return modules.FusedEmbedding(self._matrix(f"{path}.matrix", [path]))

    def _matrix(self, path: str, sources: list[str]) -> nn.Module:
        if sources[0] not in self.student.quantized:
            loads = [self._float(f"{source}.weight") for source in sources]
            whole = _concatenated(loads)
            self.constants[f"{path}.weight"] = whole
            return self._new(modules.FloatWeight, *whole.shape)
        tensors = [self.student.quantized[source] for source in sources]
        layout = BlockLayout.of(tensors[0], sources[0])
        rows, columns = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        matrix = self._new(modules.QuantizedWeight, rows, columns, layout)
        for name, buffer in matrix.named_buffers():
            parts = [
                Constant(_dtype(buffer), (t.shape[0], *buffer.shape[1:]), partial(self._part, name, source))
                for t, source in zip(tensors, sources, strict=True)
            ]
            self.constants[f"{path}.{name}"] = _concatenated(parts)
        self.inherited[path] = Inherited(
            tuple(sources), tuple(t.shape[0] for t in tensors), columns, layout.bits, layout.block
        )
        return matrix

    def _part(self, name: str, source: str) -> np.ndarray:
        return PARTS[name](self.student.quantized[source])

    def _float(self, name: str) -> Constant:
        shape = tuple(self.student.tensors[name].shape)
        return Constant("float32", shape, lambda: self.student.tensor(name).float().numpy())

    def _norm(self, path: str, norm: nn.Module) -> nn.Module:
        """Swaps a norm after comparing it, on random values, with ``edge::rms_norm``."""
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if eps is None or not hasattr(norm, "weight"):
            raise UnsupportedModule(
                f"{type(norm).__name__} has no epsilon or weight that is understood",
                where=path,
                way_out=SUPPORTED,
            )
        size = norm.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        weight, x = torch.randn(size, generator=generator), torch.randn(2, 3, size, generator=generator)
        expected = torch.func.functional_call(norm, {"weight": weight}, (x,))
        _same(path, norm, expected, ops.rms_norm.reference(x, weight, eps))
        self.constants[f"{path}.weight"] = self._float(f"{path}.weight")
        return self._new(modules.FusedRMSNorm, size, eps)

    def _rope(self, path: str, rotary: nn.Module, config: PreTrainedConfig) -> nn.Module:
        """Tabulates the family's own rotary module, after checking that its angles depend on position alone."""
        kind = config.rope_parameters.get("rope_type", "default") if config.rope_parameters else "default"
        if kind not in TABLE_ROPE:
            raise UnsupportedModule(
                f"RoPE type {kind!r} changes with the sequence length",
                where=path,
                way_out=f"Supported: {', '.join(TABLE_ROPE)}.",
            )
        own = type(rotary)(config=config)
        positions = torch.arange(self.capacity)[None]
        with torch.no_grad():
            cos, sin = own(torch.zeros(1), positions)
            short = own(torch.zeros(1), positions[:, :2])
        half = cos.shape[-1] // 2
        _same(
            path,
            rotary,
            torch.cat([cos[..., :half], sin[..., :half]], -1),
            torch.cat([cos[..., half:], sin[..., half:]], -1),
        )
        _same(path, rotary, short[0], cos[:, :2])
        for name, values in (("cos", cos), ("sin", sin)):
            self.constants[f"{path}.{name}"] = Constant.of(values[0, :, :half].contiguous().numpy())
        return self._new(modules.RopeTable, self.capacity, half)

    def _rest(self, model: PreTrainedModel) -> None:
        """Weights of modules that were left as they are."""
        for name, _ in _named_tensors(model):
            if name in self.constants:
                continue
            if name not in self.student.tensors:
                raise UnsupportedModule(
                    "the checkpoint has no value for this tensor",
                    where=name,
                    way_out=SUPPORTED,
                )
            self.constants[name] = self._float(name)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(path: str, module: nn.Module, expected: Tensor, got: Tensor) -> None:
    error = (expected - got).abs().max().item()
    if not error <= _PROBE_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UnsupportedModule(
            f"{type(module).__name__} computes something else than its fused form (difference {error:.2g})",
            where=path,
            way_out=SUPPORTED,
        )


def _concatenated(parts: list[Constant]) -> Constant:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return Constant(parts[0].dtype, shape, lambda: np.concatenate([p.load() for p in parts]))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
