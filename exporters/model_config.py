"""config.json of the decoder: checked, then turned into the shapes that transformers' own model of it has.

The model is built on the meta device, so nothing but shapes is ever allocated.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exporters.errors import ConfigError
from exporters.remote_code import refuse_remote_code
from exporters.rope_config import check_rope
from exporters.stored_names import Stored, stored_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Upper bounds: far above any edge student, low enough that building on meta stays cheap.
_DIMENSIONS = {
    "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 512, "num_attention_heads": 4096,
    "num_key_value_heads": 4096, "head_dim": 1 << 16, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 30,
}  # fmt: skip
MAX_COUNT = 4096
_COUNT_KEY = re.compile(r"(n|num)_.*(layer|head|expert|group|block|stage)s?.*|.*(layers|experts|blocks|stages)")
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NOT_FOR_US = ("student_version", "quantization_config", "transformers_version", "architectures")


@dataclass(frozen=True)
class Skeleton:
    """What transformers' model of a config consists of.

    parameters: name -> shape of every parameter and persistent buffer, as the checkpoint stores them.
    modules: name -> class names, most derived first, of every Linear and Embedding; each expert's matrices are Linears.
    stored: parameter of the model -> the tensors that hold it, where those have other names.
    tied: name -> the name whose storage it shares (the output head of a tied model).
    """

    parameters: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]
    stored: Mapping[str, Stored] = field(default_factory=dict)


def standard_names(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The config with what its family spells otherwise (``n_embd``) under the library's standard names as well.

    The names are those of the config class's ``attribute_map``. Raises ConfigError where both spellings contradict.
    """
    from transformers import CONFIG_MAPPING

    result = dict(config)
    for standard, own in CONFIG_MAPPING[config["model_type"]].attribute_map.items():
        if config.get(own) is None:
            continue
        if config.get(standard, config[own]) != config[own]:
            raise ConfigError(
                f"{standard} says {config[standard]!r:.80}, {own} says {config[own]!r:.80}",
                where=where,
                way_out="Remove the one that is wrong: they are two names of one field",
            )
        result[standard] = config[own]
    return result


def _required(model_type: str) -> list[str]:
    """The dimensions that a family's config has to state: a recurrent one has no heads, another derives its layers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    stated = {key for key in _REQUIRED if hasattr(kind, key) and not isinstance(getattr(kind, key), property)}
    return [key for key in _REQUIRED if key in stated | set(kind.attribute_map)]


def _check_dimensions(config: Mapping[str, Any], required: Collection[str], where: str) -> None:
    for key in required:
        if config.get(key) is None:
            raise ConfigError(f"{key} is missing", where=where, way_out="Add it: a default would be a guess")
    for key, most in _DIMENSIONS.items():
        value = config.get(key)
        if value is None:
            continue
        # Some families have a width for each layer; whether this one does is the library's to say.
        for one in value if key == "intermediate_size" and isinstance(value, list) else (value,):
            if isinstance(one, bool) or not isinstance(one, int) or not 0 < one <= most:
                raise ConfigError(f"{key} is {one!r:.80}", where=where, way_out=f"Give a whole number from 1 to {most}")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and config.get("head_dim") is None and config.get("hidden_size", heads) % heads:
        raise ConfigError(
            f"num_attention_heads {heads} does not divide hidden_size {config['hidden_size']}",
            where=where,
            way_out="Correct one of them, or state head_dim",
        )
    if heads and groups is not None and heads % groups:
        raise ConfigError(
            f"num_key_value_heads {groups} does not divide num_attention_heads {heads}",
            where=where,
            way_out="Correct one of them",
        )
    if config.get("head_dim", 2) is not None and config.get("head_dim", 2) % 2:
        raise ConfigError(f"head_dim {config['head_dim']} is odd", where=where, way_out="RoPE needs pairs")
    _check_counts(config, "", where)
    for key in ("rms_norm_eps", "layer_norm_eps", "rope_theta"):
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{key} is {value!r:.80}", where=where, way_out="Give a positive number")


def _check_counts(value: Any, path: str, where: str) -> None:
    """Bound every number of layers, experts and the like, at any depth: each is a module that would be built."""
    if isinstance(value, list) and len(value) > MAX_COUNT:
        raise ConfigError(f"{path} has {len(value)} entries", where=where, way_out=f"At most {MAX_COUNT}")
    items = value.items() if isinstance(value, dict) else []
    for key, item in items:
        counted = _COUNT_KEY.fullmatch(key) is not None
        if counted and isinstance(item, int | float) and not 0 <= item <= MAX_COUNT:
            raise ConfigError(f"{path}{key} is {item}", where=where, way_out=f"Give a whole number up to {MAX_COUNT}")
        if path.startswith("rope_") and isinstance(item, int | float) and not isinstance(item, bool) and item <= 0:
            raise ConfigError(f"{path}{key} is {item}", where=where, way_out="Give a positive number")
        _check_counts(item, f"{path}{key}.", where)


def check_model_config(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuse remote code, an unknown model_type, and dimensions that cannot be built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refuse_remote_code(config, where)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind)[:100], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3, cutoff=0.4)
        raise ConfigError(
            f"unknown model_type {kind!r:.100}",
            where=where,
            way_out=f"The nearest decoders of transformers: {', '.join(near) or 'none'}",
        )
    for key in ("text_config", "decoder_config", "llm_config"):
        if isinstance(config.get(key), dict):
            raise ConfigError(
                f"model_type {kind!r} holds its decoder in {key}, beside encoders of other media",
                where=where,
                way_out=f"Save the decoder alone ({config[key].get('model_type', 'its text model')}) as a checkpoint",
            )
    _check_dimensions(standard_names(config, where), _required(kind), where)
    check_rope(config, where)


def library_config(config: Mapping[str, Any], where: str = "config.json") -> PreTrainedConfig:
    """The transformers config object of a checked config, without quantisation (the weights are given, not made)."""
    from transformers import AutoConfig

    try:
        # A copy in depth: the library writes what it derives into the objects it is given.
        plain = {key: _decoded(value) for key, value in config.items() if key not in _NOT_FOR_US}
        kind = plain.pop("model_type")
        return AutoConfig.for_model(kind, attn_implementation="eager", **plain)
    except Exception as error:  # transformers raises many types here, all about the config's content
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers refuses it: {reason}", where=where, way_out="Correct the field") from error


def _decoded(value: Any) -> Any:
    """A copy in depth, with the floats that JSON has no number for: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def skeleton(config: Mapping[str, Any], where: str = "config.json", present: Collection[str] = frozenset()) -> Skeleton:
    """Parameters, modules and ties of the model that transformers builds from `config`, on the meta device.

    Args:
        present: names of the checkpoint's tensors: of a parameter that may be stored in two ways it decides which.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = library_config(config, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=False)
    except Exception as error:  # as above: whatever a model class raises on bad dimensions
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers cannot build it: {reason}", where=where, way_out="Correct it") from error
    model.tie_weights()
    canonical: dict[int, str] = {}
    tied, parameters = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(parameter), name)
        if first == name:
            parameters[name] = tuple(parameter.shape)
        else:
            tied[name] = first
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent:
            parameters[name] = tuple(buffer.shape)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = {
        name: tuple(base.__name__ for base in type(module).__mro__ if issubclass(base, torch.nn.Module))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
    stored = stored_names(model, present, where)
    for name, held in stored.items():
        del parameters[name]
        parameters |= held.names
        parts = [part.removesuffix(".weight") for group in held.groups for part in group]
        modules |= dict.fromkeys(parts, ("Linear", "Module"))
        if not held.groups and (kind := modules.pop(name.removesuffix(".weight"), None)):
            modules[next(iter(held.names)).removesuffix(".weight")] = kind
    return Skeleton(parameters, modules, tied, stored)
