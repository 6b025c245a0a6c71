"""Under which names a checkpoint stores the parameters of a model, where those are not the model's own.

transformers 5 keeps the experts of a layer in one parameter of three dimensions, while checkpoints hold a Linear for
each expert, under the names that the family had first. The library's own mapping (``conversion_mapping``, which
``save_pretrained`` applies backwards) is asked on the meta device, so nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: What the parts of a parameter go through on loading, in order -> whether the groups are joined along axis 1.
_STACKED = {("MergeModulelist",): False, ("MergeModulelist", "Concatenate"): True}


@dataclass(frozen=True)
class Stored:
    """How one parameter is stored.

    Attributes:
        names: tensor of the checkpoint -> its shape, in the library's order.
        groups: of a parameter [E, N, K]: the matrices of each expert by their kind, ((gate 0, gate 1, ...),
            (up 0, up 1, ...)), whose rows stand behind each other; () where the parameter is one tensor.
    """

    names: Mapping[str, tuple[int, ...]]
    groups: tuple[tuple[str, ...], ...] = ()


def stored_names(model: PreTrainedModel, present: Collection[str], where: str) -> dict[str, Stored]:
    """Parameter or persistent buffer -> how the checkpoint holds it; those under their own name are left out.

    Args:
        model: on the meta device.
        present: names of the tensors that the checkpoint has: what it holds as the model does is taken as it is.

    Raises:
        ConfigError: a checkpoint of this family is stored in an arrangement that is not understood.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    state = model.state_dict()
    converted = {name for name in set(state) - set(revert_weight_conversion(model, state)) if name not in present}
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    result = {}
    for name in (name for name in state if name in converted):
        parts = revert_weight_conversion(model, {name: state[name]})
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        result[name] = Stored(shapes, _groups(name, shapes, renamings, converters, where))
    return result


def _groups(
    name: str, shapes: Mapping[str, tuple[int, ...]], renamings: list, converters: list, where: str
) -> tuple[tuple[str, ...], ...]:
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    found: dict[str, list[str]] = {}
    for part in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(part, renamings, converters)
        if target != name:
            raise ConfigError(f"the tensor {part!r} would be loaded as {target!r}", where=where, way_out=_WAY_OUT)
        found.setdefault(pattern, []).append(part)
    if list(found) == [None]:
        return ()
    converter = next(entry for entry in converters if set(found) <= set(entry.source_patterns))
    operations = tuple(type(operation).__name__ for operation in converter.operations)
    if operations not in _STACKED or _STACKED[operations] != (len(found) > 1):
        raise ConfigError(
            f"{name} is stored in an arrangement that is not understood ({', '.join(operations)})",
            where=where,
            way_out=_WAY_OUT,
        )
    return tuple(tuple(found[pattern]) for pattern in converter.source_patterns)


_WAY_OUT = "Save the checkpoint with save_pretrained(..., save_original_format=False)"


def assembled(groups: tuple[tuple[torch.Tensor, ...], ...]) -> torch.Tensor:
    """The parameter [E, N, K] from the experts' matrices, see Stored.groups."""
    import torch

    return torch.cat([torch.stack(group) for group in groups], 1)
