"""The two spellings of rotary embeddings in config.json, and the check that they do not contradict each other.

Configs of transformers 5 have `rope_parameters`; older ones `rope_theta`, `rope_scaling` and, per family,
`partial_rotary_factor`, `rotary_pct` or `rope_local_base_freq`. transformers reads both. Where a config has both,
the library silently takes one of them, in an order that other readers do not share, so a contradiction is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exporters.errors import ConfigError

#: key of the old spelling -> (kind of layer whose table it is about, key in `rope_parameters`)
_OLD: Mapping[str, tuple[str, str]] = {
    "rope_theta": ("full_attention", "rope_theta"),
    "rotary_emb_base": ("full_attention", "rope_theta"),
    "rope_local_base_freq": ("sliding_attention", "rope_theta"),
    "partial_rotary_factor": ("full_attention", "partial_rotary_factor"),
    "rotary_pct": ("full_attention", "partial_rotary_factor"),
}


def check_rope(config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a config whose old and new spelling of RoPE say different things."""
    new = config.get("rope_parameters")
    if not isinstance(new, dict):
        return
    for key, kind, name, old in _old_spelling(config):
        nested = any(isinstance(value, dict) for value in new.values())
        table = new.get(kind) if nested else new
        if not isinstance(table, dict):  # a family with tables of its own kinds, or without this one
            continue
        missing = {"rope_type": "default", "partial_rotary_factor": 1.0}.get(name)
        value = table.get(name, table.get("type") if name == "rope_type" else None)
        # A missing theta is taken from the old spelling; anything else that is missing has its usual value.
        if value is None and name == "rope_theta":
            continue
        if (missing if value is None else value) != old:
            raise ConfigError(
                f"{key} says {old!r:.80}, rope_parameters says {value!r:.80} for {name}",
                where=where,
                way_out="Remove the spelling that is wrong; transformers 5 writes rope_parameters alone",
            )


def _old_spelling(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """(path of the field, kind of layer, key in `rope_parameters`, value) of every field of the old spelling."""
    for key, (kind, name) in _OLD.items():
        if config.get(key) is not None:
            yield key, kind, name, config[key]
    scaling = config.get("rope_scaling")
    for key, value in scaling.items() if isinstance(scaling, dict) else ():
        if value is not None:
            yield f"rope_scaling.{key}", "full_attention", "rope_type" if key == "type" else key, value
