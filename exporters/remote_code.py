"""Configurations that ask to run code which came with the checkpoint."""

from __future__ import annotations

from typing import Any

from exporters.errors import ConfigError

_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate"})


def refuse_remote_code(value: Any, where: str, path: str = "") -> None:
    """Raise ConfigError for a parsed config that names code to run, or kernels to fetch, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _KEYS:
                raise ConfigError(
                    f"{path}{key} asks to run code that came with the checkpoint",
                    where=where,
                    way_out="Only classes of the installed libraries are used; remove the key",
                )
            if key in ("attn_implementation", "_attn_implementation") and item not in (None, "eager", "sdpa"):
                raise ConfigError(f"{path}{key} is {item!r:.80}", where=where, way_out="Remove the key")
            refuse_remote_code(item, where, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            refuse_remote_code(item, where, f"{path}{index}.")
