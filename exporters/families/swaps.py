"""Swaps of whole leaf modules of a transformers model for fused ones, each proven before it is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from exporters import ops
from exporters.families import modules
from exporters.families.matrices import Matrices
from exporters.families.unsupported import SUPPORTED, UnsupportedModule
from exporters.program import Constant

#: joined projection -> its parts, in the order of their rows: one matrix product instead of several.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

#: RoPE types whose angles depend on the position alone, so that a table holds them.
TABLE_ROPE = ("default", "linear", "llama3", "yarn")

_PROBE_TOLERANCE = 2e-6


class Swap:
    """Replaces the leaf modules of a model of fake tensors, recording how each new weight is loaded."""

    def __init__(self, matrices: Matrices, capacity: int):
        self.matrices, self.capacity = matrices, capacity

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
                    setattr(parent, attribute, self.matrices.linear(path, [path], child.bias is not None))
                elif isinstance(child, nn.Embedding):
                    setattr(parent, attribute, self.matrices.embedding(path))
                elif type(child).__name__.endswith("RMSNorm"):
                    setattr(parent, attribute, self._norm(path, child))
                elif type(child).__name__.endswith("RotaryEmbedding"):
                    setattr(parent, attribute, self._rope(path, child, model.config))
        self._rest(model)

    def _tied_head(self, model: PreTrainedModel) -> None:
        if not model.config.tie_word_embeddings:
            return
        path = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        embedding = self.matrices.embedding(path)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(modules.TiedHead(embedding.matrix))

    def _join(self, path: str, parent: nn.Module, joined: str, parts: tuple[str, ...]) -> None:
        sources = [f"{path}.{part}" for part in parts]
        linears = [getattr(parent, part) for part in parts]
        if len({linear.bias is None for linear in linears}) > 1 or not self.matrices.joinable(sources):
            return
        fused = self.matrices.linear(f"{path}.{joined}", sources, linears[0].bias is not None)
        setattr(parent, joined, fused)
        start = 0
        for part, linear in zip(parts, linears, strict=True):
            setattr(parent, part, modules.LinearSlice(fused, start, start + linear.out_features))
            start += linear.out_features

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
        self.matrices.constants[f"{path}.weight"] = self.matrices.float(f"{path}.weight")
        return self.matrices.new(modules.FusedRMSNorm, size, eps)

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
            self.matrices.constants[f"{path}.{name}"] = Constant.of(values[0, :, :half].contiguous().numpy())
        return self.matrices.new(modules.RopeTable, self.capacity, half)

    def _rest(self, model: PreTrainedModel) -> None:
        """Weights of modules that were left as they are."""
        for name, _ in _named_tensors(model):
            if name in self.matrices.constants:
                continue
            if name not in self.matrices.student.tensors:
                raise UnsupportedModule(
                    "the checkpoint has no value for this tensor",
                    where=name,
                    way_out=SUPPORTED,
                )
            self.matrices.constants[name] = self.matrices.float(name)


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
