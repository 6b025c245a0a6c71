"""Attention and cache: the objects that transformers calls back, first to be understood and then to be captured.

A model is run twice over fake tensors. ``read_layers`` notes what each attention layer caches and which mask it asked
the library for; the capture then places ``edge::kv_attention`` with what was found. The mask is what transformers'
eager attention obeys, so windows are read from it and not from a config's fields, of which some are not in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface

from exporters import ops
from exporters.errors import ExportError
from exporters.families.eager_attention import OwnAttention, Rows
from exporters.families.unsupported import SUPPORTED, UnsupportedModule

#: Name under which transformers finds our attention and our masks.
ATTENTION = "edge"

#: What transformers hands to every attention and what a causal one with a cache does not need. A sliding window is
#: read from the mask instead.
_IGNORED = frozenset((
    "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "is_causal", "sliding_window", "position_embeddings", "output_router_logits", "logits_to_keep",
))  # fmt: skip
#: The cache of the model that runs: families hand different arguments down to their attention.
_CACHE: ContextVar[LayerReader | StateCache] = ContextVar("cache")
#: How many queries of a mask are compared with the pattern that was read from it.
_COMPARED = 512


class UnknownState(UnsupportedModule, AttributeError):
    """A model asks the cache for something that is no key or value, or the mask for what it is not; an AttributeError,
    so that it may ask whether."""


@dataclass(frozen=True)
class Mask:
    """What stands for a mask while a model runs: the library's function of (batch, head, query, key) behind it."""

    function: Callable[..., Tensor]

    def __getattr__(self, name: str) -> Any:
        raise UnknownState(
            f"asks the mask for {name!r}: it makes a mask of its own (ALiBi, or the like)",
            where="attention_mask",
            way_out=SUPPORTED,
        )

    def window(self, capacity: int, where: str) -> int:
        """How many newest positions a query sees within ``capacity``, 0 for all.

        Raises:
            UnsupportedModule: the mask is neither causal nor a causal sliding window.
        """
        queries = torch.unique(torch.linspace(0, capacity - 1, _COMPARED).round().long())[:, None]
        keys = torch.arange(capacity)[None]
        zero = torch.zeros(1, 1, dtype=torch.long)
        try:
            seen = self.function(zero, zero, queries, keys).expand(len(queries), capacity)
        except Exception as error:  # whatever a closure over tensors of the forward pass raises on others
            raise UnsupportedModule(
                f"the mask depends on more than positions ({error})", where=where, way_out=SUPPORTED
            ) from error
        width = int(seen[-1].sum())
        if not torch.equal(seen, (keys <= queries) & (keys > queries - width)):
            raise UnsupportedModule(
                "the mask is neither causal nor a causal sliding window (chunked or bidirectional attention)",
                where=where,
                way_out=SUPPORTED,
            )
        return 0 if width >= capacity else width


@dataclass(frozen=True)
class Layer:
    """What one layer caches: [1, kv_heads, C, width] for keys and for values, seen through ``window`` (0 for all)."""

    kv_heads: int
    width: int
    window: int


class _Cache:
    """The library's cache as far as attention with a cache calls it; whatever else is asked for is refused by name."""

    is_compileable = False
    #: Whether the model does without the library's attention interface.
    own = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        if self.own:
            return tuple(Rows(OwnAttention(layer_idx), rows, self.attend) for rows in (key, value))
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def __getattr__(self, name: str) -> Any:
        raise UnknownState(
            f"asks the cache for {name!r}: a layer keeps another state than keys and values, or shares them",
            where="past_key_values",
            way_out=SUPPORTED,
        )


class LayerReader(_Cache):
    """Notes what every attention layer caches; attention itself gives zeros."""

    def __init__(self, paths: Mapping[int, str], own: bool):
        self.paths, self.own, self.found = paths, own, {}

    def attend(self, module, query, key, value, mask, scale, softcap) -> Tensor:
        where = self.paths.get(id(module), f"layer {module.layer_idx}")
        kind = type(module).__name__
        if module.layer_idx in self.found:
            raise UnsupportedModule(f"{kind} attends a second time in its layer", where=where, way_out=SUPPORTED)
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise UnsupportedModule(
                f"{kind} has keys of shape {list(key.shape)} and values of shape {list(value.shape)} (multi-head "
                "latent attention or the like)",
                where=where,
                way_out=SUPPORTED,
            )
        if not isinstance(mask, Mask):
            raise UnsupportedModule(
                f"{kind} does not take its mask from the library's mask functions, so what it hides is unknown",
                where=where,
                way_out=SUPPORTED,
            )
        self.found[module.layer_idx] = (where, tuple(key.shape), mask)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


class StateCache(_Cache):
    """Hands key and value through unchanged: attention itself reads the past and writes the present."""

    def __init__(
        self, layers: tuple[Layer, ...], past: list[Tensor], last: Tensor, scales: Sequence[Tensor], own: bool
    ):
        self.layers_read, self.past, self.present, self.last = layers, past, list(past), last
        self.scales, self.own = scales, own

    def attend(self, module, query, key, value, mask, scale, softcap) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        rows = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
        at = 2 * module.layer_idx
        out, self.present[at], self.present[at + 1] = ops.kv_attention(
            *rows,
            self.past[at],
            self.past[at + 1],
            self.last,
            None,
            None,
            heads,
            kv_heads,
            scale,
            self.layers_read[module.layer_idx].window,
            softcap,
            *self.scales[at : at + 2],
        )
        return out.reshape(*out.shape[:2], heads, query.shape[-1])


class RangeReader(_Cache):
    """Notes how far the keys (with RoPE) and values of every layer reach: [kv_heads, D] of the largest magnitudes.

    Attributes:
        kept: bool [n, L], the positions that count, of the rows that the model is called with.
    """

    kept: Tensor

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for held, rows in ((self.keys, key), (self.values, value)):
            largest = rows.transpose(1, 2)[self.kept].abs().amax(0)
            held[layer_idx] = torch.maximum(held[layer_idx], largest) if layer_idx in held else largest
        return key, value


def read_layers(model: nn.Module, capacity: int, fake: FakeTensorMode) -> tuple[Layer, ...]:
    """What each layer of ``model`` caches, in order; it runs once, on three fake tokens.

    Raises:
        UnsupportedModule: a layer that keeps no key and value, or attention of a kind that no fused form has.
    """
    if shared := getattr(model.config, "num_kv_shared_layers", 0):
        raise UnsupportedModule(
            f"the last {shared} layers attend to the keys and values of others, which no cache here shares",
            where="config.json: num_kv_shared_layers",
            way_out=SUPPORTED,
        )
    reader = LayerReader({id(module): name for name, module in model.named_modules()}, own_attention(model))
    try:
        with fake, torch.no_grad():
            run(model, torch.zeros(1, 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)[None], reader)
    except ExportError:
        raise
    except Exception as error:  # a model's own code with fake tensors: it looks at values, or wants another cache
        raise UnsupportedModule(
            f"its forward cannot be traced: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            where=_culprit(error, reader.paths) or type(model).__name__,
            way_out=SUPPORTED,
        ) from error
    # Of an encoder-decoder, the config's number is the encoder's.
    count = max([model.config.num_hidden_layers, *(index + 1 for index in reader.found)])
    if missing := sorted(set(range(count)) - set(reader.found)):
        raise UnsupportedModule(
            f"layers {', '.join(map(str, missing))} of {count} do not attend through the library's attention interface "
            "(a recurrent or linear-attention layer, or attention of its own)",
            where=type(model).__name__,
            way_out=SUPPORTED,
        )
    return tuple(
        Layer(shape[1], shape[3], mask.window(capacity, where))
        for where, shape, mask in (reader.found[index] for index in range(count))
    )


def own_attention(model: nn.Module) -> bool:
    """Whether ``model`` attends by code of its own, and not through the library's interface."""
    return not model._supports_attention_backend


def _culprit(error: BaseException, paths: Mapping[int, str]) -> str:
    """Path and class of the innermost module whose code raised ``error``."""
    found, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if path := paths.get(id(module)):
            found = f"{path} ({type(module).__name__})"
        trace = trace.tb_next
    return found


def run(model: nn.Module, ids: Tensor, positions: Tensor, cache: LayerReader | StateCache) -> Tensor:
    """The logits [1, 1, V] of the newest token, by the model's own forward with ``cache`` in every attention."""
    token = _CACHE.set(cache)
    try:
        return model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    finally:
        _CACHE.reset(token)


def _edge_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """transformers' attention interface on top of ``edge::kv_attention``; query and key come with RoPE applied.

    Args:
        query: [B, H, S, D]; key, value: [B, KV, S, D].

    Returns:
        ([B, S, H, D], None), as the library's own.
    """
    if unknown := sorted(name for name, given in kwargs.items() if name not in _IGNORED and given is not None):
        raise UnsupportedModule(
            f"attention takes {', '.join(unknown)}, which no fused form has",
            where=type(module).__name__,
            way_out=SUPPORTED,
        )
    if isinstance(key, Rows):  # the class does not say so, but it does call the interface
        key, value = key.rows, value.rows
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return _CACHE.get().attend(module, query, key, value, attention_mask, scale, softcap or 0.0), None


def _edge_mask(mask_function: Callable[..., Tensor], **kwargs) -> Mask:
    """transformers' mask interface: nothing is built, the op hides by itself."""
    return Mask(mask_function)


AttentionInterface.register(ATTENTION, _edge_attention)
AttentionMaskInterface.register(ATTENTION, _edge_mask)
