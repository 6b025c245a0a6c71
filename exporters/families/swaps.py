"""Swaps of leaf modules of a transformers model for fused ones, each proven on random values before it is used.

A module that has no fused form is traced as it is, if it has no weights of its own, or if it is shown to treat each
position by itself. Anything else that holds weights was not understood, and the error names it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exporters import ops
from exporters.families import modules
from exporters.families.experts import dense_experts, is_experts
from exporters.families.matrices import Matrices
from exporters.families.probes import PROBE_TOLERANCE, error, random, same
from exporters.families.rope import tabulate
from exporters.families.streaming import empty_model
from exporters.families.unsupported import SUPPORTED, UnsupportedModule
from exporters.program import Constant

#: joined projection -> its parts, in the order of their rows: one matrix product instead of several.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Swap:
    """Replaces the leaf modules of a model of fake tensors, recording how each new weight is loaded."""

    def __init__(self, matrices: Matrices, capacity: int):
        self.matrices, self.capacity = matrices, capacity
        #: Parts of the model whose rows are looked up by position: what `check_positions` is about.
        self.by_position: list[str] = []
        self._tokens: nn.Module | None = None

    def model(self, model: PreTrainedModel) -> None:
        self._tied_head(model)
        self._tokens = model.get_input_embeddings()
        for name, parent in list(model.named_modules()):
            if _elementwise_between(parent, JOINED["gate_up_proj"], "down_proj"):
                self.matrices.fold_order(f"{name}.down_proj", [f"{name}.{part}" for part in JOINED["gate_up_proj"]])
        for name, parent in list(model.named_modules()):
            for joined, parts in JOINED.items():
                if all(type(getattr(parent, part, None)) is nn.Linear for part in parts):
                    self._join(name, parent, joined, parts)
        for name, parent in list(model.named_modules()):
            for attribute, child in list(parent.named_children()):
                path = f"{name}.{attribute}" if name else attribute
                if (fused := self._fused(path, child, model.config)) is not None:
                    setattr(parent, attribute, fused)
        self._rest(model)

    def _fused(self, path: str, child: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
        """What takes the place of ``child``, or None where it stays."""
        kind = type(child)
        if kind is nn.Linear or (isinstance(child, nn.Linear) and _is_linear(child)):
            return self.matrices.linear(path, [path], child.bias is not None)
        if kind is Conv1D:
            return self.matrices.transposed_linear(path)
        if isinstance(child, nn.Embedding):
            if child is self._tokens:
                return self._embedding(path, child)
            return self._position_embedding(path, child, config)
        if kind.__name__.endswith("RotaryEmbedding"):
            return self._rope(path, child, config)
        if is_experts(child):
            return dense_experts(path, child, config, self.matrices)
        if kind.__name__.endswith("Norm") and kind is not nn.LayerNorm:
            return self._norm(path, child)
        return None

    def _tied_head(self, model: PreTrainedModel) -> None:
        if not getattr(model.config, "tie_word_embeddings", False):
            return
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        if type(head) is not nn.Linear:
            raise UnsupportedModule(
                f"the tied head is a {type(head).__name__}", where=names.get(id(head), "head"), way_out=SUPPORTED
            )
        embedding = self._embedding(names[id(table)], table)
        bias = None
        if head.bias is not None:
            path = f"{names[id(head)]}.bias"
            bias = self.matrices.new(lambda: nn.Parameter(torch.empty_like(head.bias), requires_grad=False))
            self.matrices.constants[path] = self.matrices.float(path)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(modules.TiedHead(embedding.matrix, bias))

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

    def _embedding(self, path: str, table: nn.Embedding) -> modules.FusedEmbedding:
        """A table whose rows are taken as they are, or times a constant (Gemma's square root of the width)."""
        if type(table) is nn.Embedding:
            return self.matrices.embedding(path)
        scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
        if not isinstance(scale, int | float):
            raise UnsupportedModule(f"{type(table).__name__} is not understood", where=path, way_out=SUPPORTED)
        values = {"weight": random(5, table.embedding_dim)}
        if "embed_scale" in dict(table.named_buffers()):
            values["embed_scale"] = torch.tensor(scale)
        ids = torch.tensor([[4, 0, 2]])
        fused = F.embedding(ids, values["weight"]) * scale
        same(path, table, torch.func.functional_call(table, values, (ids,)), fused)
        return self.matrices.embedding(path, scale)

    def _position_embedding(self, path: str, table: nn.Embedding, config: PreTrainedConfig) -> modules.FusedEmbedding:
        """A table beside the tokens' own: a row for each position, in some families behind rows that are left over.

        Raises:
            UnsupportedModule: it computes something else, or has fewer rows than there are positions.
        """
        offset, called_with_positions = getattr(table, "offset", 0), modules.takes_positions(table)
        if (type(table) is not nn.Embedding and not called_with_positions) or not isinstance(offset, int):
            return self._embedding(path, table)
        rows = table.num_embeddings - offset
        if called_with_positions or rows == getattr(config, "max_position_embeddings", None):
            _check_rows(path, rows, self.capacity)
            self.by_position.append(path)
        elif rows < self.capacity:
            raise UnsupportedModule(
                f"{type(table).__name__} of {rows} rows beside the tokens' is not understood",
                where=path,
                way_out=SUPPORTED,
            )
        if called_with_positions:
            ids, weight = torch.tensor([[0, 1, 3]]), random(4 + offset, table.embedding_dim)
            try:
                given = torch.func.functional_call(
                    table, {"weight": weight}, (torch.ones(1, 3),), {"position_ids": ids}
                )
            except Exception as error:  # it is called in another way
                raise UnsupportedModule(
                    f"{type(table).__name__} is not understood ({error})", where=path, way_out=SUPPORTED
                ) from error
            same(path, table, given, F.embedding(ids + offset, weight))
            return modules.PositionEmbedding(self.matrices.embedding(path).matrix, offset)
        return self.matrices.embedding(path)

    def _norm(self, path: str, norm: nn.Module) -> nn.Module | None:
        """``edge::rms_norm`` with the weight as it is, with 1 + it (Gemma) or without any, whichever it computes.

        The sum is the library's own, in float32, so nothing is lost by computing it ahead.
        """
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        names = [name for name, _ in _named_tensors(norm)]
        if not isinstance(eps, float) or names not in ([], ["weight"]):
            return None
        size = norm.weight.shape[0] if names else 8
        weight, x = random(size), random(2, 3, size)
        try:
            expected = torch.func.functional_call(norm, {"weight": weight} if names else {}, (x,))
        except (TypeError, RuntimeError):  # called with more than the rows, so it is no plain norm
            return None
        forms = {"weight": weight, "1 + weight": 1 + weight} if names else {"ones": torch.ones(size)}
        for form, multiplier in forms.items():
            if error(expected, ops.rms_norm.reference(x, multiplier, eps)) <= PROBE_TOLERANCE:
                return self._rms_norm(path, form, size if names else None, eps)
        return None

    def _rms_norm(self, path: str, form: str, size: int | None, eps: float) -> nn.Module:
        if size is None:
            return modules.PlainRMSNorm(eps)
        stored = self.matrices.float(f"{path}.weight")
        added = Constant(stored.dtype, stored.shape, lambda: 1 + stored.load())
        self.matrices.constants[f"{path}.weight"] = stored if form == "weight" else added
        return self.matrices.new(modules.FusedRMSNorm, size, eps)

    def _rope(self, path: str, rotary: nn.Module, config: PreTrainedConfig) -> nn.Module:
        tables = tabulate(path, rotary, config, self.capacity)
        self.by_position.append(path)
        halves = all(
            table.shape[1] % 2 == 0 and torch.equal(*table.chunk(2, 1)) for pair in tables.values() for table in pair
        )
        for kind, pair in tables.items():
            for name, table in zip(("cos", "sin"), pair, strict=True):
                kept = table[:, : table.shape[1] // 2] if halves else table
                values = Constant.of(kept.contiguous().numpy())
                self.matrices.constants[f"{path}.{modules.table_name(kind, name)}"] = values
        widths = {kind: cos.shape[1] for kind, (cos, _) in tables.items()}
        return self.matrices.new(modules.RopeTables, self.capacity, widths, halves)

    def _rest(self, model: PreTrainedModel) -> None:
        """Weights of modules that were left as they are."""
        for path, module in model.named_modules():
            if not any(f"{path}.{name}" not in self.matrices.constants for name, _ in _own_tensors(module)):
                continue
            if type(module) is not nn.LayerNorm and list(module.parameters(recurse=False)):
                _position_wise(path, module, model.config)
            for name, _ in module.named_parameters(recurse=False):
                self._stored(f"{path}.{name}")
            for name, buffer in module.named_buffers(recurse=False):
                if not self._stored(f"{path}.{name}"):
                    self._computed(f"{path}.{name}", buffer, model.config)

    def _stored(self, name: str) -> bool:
        if name in self.matrices.student.tensors:
            self.matrices.constants[name] = self.matrices.float(name)
        return name in self.matrices.student.tensors

    def _computed(self, name: str, buffer: Tensor, config: PreTrainedConfig) -> None:
        """A number or a table of positions that is computed when the library makes the model, as GPT-J's sines.

        Any other computed buffer has no value here; capture refuses it if the graph reads it.
        """
        if buffer.dim():
            if buffer.shape[0] != getattr(config, "max_position_embeddings", None):
                return
            _check_rows(name, buffer.shape[0], self.capacity)
            self.by_position.append(name)
        dtype = str(buffer.dtype).removeprefix("torch.")
        self.matrices.constants[name] = Constant(
            dtype, tuple(buffer.shape), lambda: self._made.get_buffer(name).numpy()
        )

    @cached_property
    def _made(self) -> PreTrainedModel:
        """The library's own model, of which only buffers hold values."""
        return empty_model(self.matrices.student)


def _check_rows(path: str, rows: int, capacity: int) -> None:
    """Refuses a table that has no row for the last positions of the context."""
    if rows < capacity:
        raise UnsupportedModule(
            f"the table of positions has {rows} rows, and the context {capacity} positions",
            where=path,
            way_out=f"Build with --context {rows}.",
        )


def _is_linear(layer: nn.Linear) -> bool:
    """Whether a subclass of Linear, as Falcon's, computes what Linear does: a small one of it is tried."""
    plain = nn.Linear(5, 3, bias=layer.bias is not None)
    if vars(layer).keys() != vars(plain).keys():  # it has more to go by than its weight and bias
        return False
    x, values = random(2, 4, 5), {name: random(*t.shape) for name, t in plain.named_parameters()}
    try:
        got = torch.func.functional_call(type(layer)(5, 3, bias=layer.bias is not None), values, (x,))
    except (AttributeError, RuntimeError, TypeError):  # it is made or called with more
        return False
    return error(F.linear(x, values["weight"], values.get("bias")), got) <= PROBE_TOLERANCE


def _position_wise(path: str, module: nn.Module, config: PreTrainedConfig) -> None:
    """Refuses a module with weights of its own unless each row of its results depends on the same row alone."""
    values = {name: random(*tensor.shape) for name, tensor in _named_tensors(module)}
    sizes = {tensor.shape[axis] for tensor in values.values() for axis in range(-tensor.dim(), 0)}
    for size in sorted(sizes | {config.hidden_size}, reverse=True):
        x = random(1, 4, size)
        try:
            whole, part = (torch.func.functional_call(module, values, (rows,)) for rows in (x, x[:, 2:3]))
        except Exception:  # rows of this width are not what the module takes, and it says so in its own way
            continue
        pairs = list(zip(_rows(whole), _rows(part), strict=False))
        if pairs and all(a.shape[0] == 4 and error(a[2:3], b) <= PROBE_TOLERANCE for a, b in pairs):
            return
    raise UnsupportedModule(f"{type(module).__name__} is not understood", where=path, way_out=SUPPORTED)


def _rows(results: Tensor | tuple) -> list[Tensor]:
    """Each result as [rows, ...]."""
    given = results if isinstance(results, tuple) else (results,)
    return [t.flatten(0, 1) if t.dim() == 3 else t for t in given if isinstance(t, Tensor)]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _elementwise_between(parent: nn.Module, before: tuple[str, ...], behind: str) -> bool:
    """Whether a module applies nothing but feature-by-feature functions between linear layers of it.

    Its forward runs with those layers replaced by the identity: permuted features must give permuted results.
    """
    if not all(isinstance(getattr(parent, name, None), nn.Linear) for name in (*before, behind)):
        return False
    bare = copy.copy(parent)
    bare._modules = {**parent._modules, **{name: nn.Identity() for name in (*before, behind)}}
    generator = torch.Generator().manual_seed(0)
    x, order = torch.randn(2, 3, 64, generator=generator), torch.randperm(64, generator=generator)
    try:
        with torch.no_grad():
            return torch.equal(bare(x[..., order]), bare(x)[..., order])
    except (AssertionError, AttributeError, RuntimeError, TypeError):  # it needs its own layers, or has other weights
        return False


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
