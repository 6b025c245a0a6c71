"""Rotary embeddings as tables: the family's own module is asked for every position once, and checked.

Whatever a family does to its angles (scaling by Llama 3, YaRN, linear or proportional factors, several tables for
several kinds of layer, a part of the head alone) is then in the numbers. A type whose angles change with the length of
the sequence (``dynamic``, ``longrope``) has one table as long as the capacity stays within the length up to which it
does not; beyond that no table is right for all lengths, and it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from exporters.families.unsupported import SUPPORTED, UnsupportedModule

#: Cosines and sines of the same angles, computed in tensors of two shapes, differ by no more: a library may round them
#: differently in the middle of a vector and at its end. Angles that follow the length differ by a thousand times that.
ROUNDING = 1e-6

#: Kind of layer -> (cos, sin), each [C, R]; the kind is "" where a family has one table.
Tables = Mapping[str, tuple[Tensor, Tensor]]


def tabulate(path: str, rotary: nn.Module, config: PreTrainedConfig, capacity: int) -> Tables:
    """The angles of positions 0 to C-1, as the module computes them.

    Raises:
        UnsupportedModule: a module of another kind, or one whose angles depend on more than the position.
    """
    parameters = inspect.signature(type(rotary).forward).parameters
    if "position_ids" not in parameters:
        raise UnsupportedModule(f"{type(rotary).__name__} does not take positions", where=path, way_out=SUPPORTED)
    kinds = list(rotary.rope_type) if "layer_type" in parameters else [""]
    return {kind: _table(path, rotary, config, capacity, kind) for kind in kinds}


def _table(path: str, rotary: nn.Module, config: PreTrainedConfig, capacity: int, kind: str) -> tuple[Tensor, Tensor]:
    positions = torch.arange(capacity)[None]
    whole = _angles(path, rotary, config, positions, kind)
    # A sequence that ends early and one that begins late: what a session asks for step by step.
    for part in (slice(0, 2), slice(0, capacity // 2 + 1), slice(capacity - 1, capacity)):
        alone = _angles(path, rotary, config, positions[:, part], kind)
        moved = max(float((a - b[part]).abs().max()) for a, b in zip(alone, whole, strict=True))
        if not moved <= ROUNDING:
            name = rotary.rope_type[kind] if kind else getattr(rotary, "rope_type", type(rotary).__name__)
            raise UnsupportedModule(
                f"RoPE type {name!r} changes with the sequence length within {capacity} positions (by {moved:.1g})",
                where=path,
                way_out=_way_out(config, kind, capacity),
            )
    return whole


def _angles(
    path: str, rotary: nn.Module, config: PreTrainedConfig, positions: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, R] from a new module of the same class: some remember the longest sequence they saw."""
    own = type(rotary)(config=config)
    with torch.no_grad():
        angles = own(torch.zeros(1), positions, **({"layer_type": kind} if kind else {}))
    shape = (1, positions.shape[1])
    if not (
        isinstance(angles, tuple) and len(angles) == 2 and all(a.shape[:2] == shape and a.dim() == 3 for a in angles)
    ):
        raise UnsupportedModule(
            f"{type(rotary).__name__} returns something else than cosines and sines of each position",
            where=path,
            way_out=SUPPORTED,
        )
    return angles[0][0].float(), angles[1][0].float()


def _way_out(config: PreTrainedConfig, kind: str, capacity: int) -> str:
    given = config.rope_parameters.get(kind, config.rope_parameters) if config.rope_parameters else {}
    limit = given.get("original_max_position_embeddings") or config.max_position_embeddings
    if limit < capacity:
        return f"Up to {limit} positions it does not: build with --context {limit}."
    return SUPPORTED
