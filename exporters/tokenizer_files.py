"""Tokenizer files: checked as data, and the ids of the special tokens.

tokenizer.json is the format of the `tokenizers` library. Chat templates are neither read nor rendered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import TokenizerError
from exporters.package import Package
from exporters.safe_files import read_json


@dataclass(frozen=True)
class Vocabulary:
    """Token text -> id, from tokenizer.json: the model's own entries, and those plus the added tokens."""

    model: Mapping[str, int]
    every: Mapping[str, int]


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json."""
    document = read_json(path)
    vocab = document["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {entry[0]: index for index, entry in enumerate(vocab)}
    every = dict(vocab) | {entry["content"]: entry["id"] for entry in document.get("added_tokens", [])}
    return Vocabulary(vocab, every)


def special_ids(package: Package, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """{"bos": id or None, "eos": [ids], "pad": id or None}.

    generation_config.json wins over config.json (as transformers' generate does), which wins over
    special_tokens_map.json.
    """
    sources = [dict(package.config)]
    if path := package.path("generation_config.json"):
        sources.insert(0, read_json(path))
    named = read_json(path) if (path := package.path(package.tokenizer_prefix + "special_tokens_map.json")) else {}
    size = package.config["vocab_size"]
    result: dict[str, Any] = {}
    for kind in ("bos", "eos", "pad"):
        value = next((item[f"{kind}_token_id"] for item in sources if item.get(f"{kind}_token_id") is not None), None)
        if value is None and vocabulary is not None:
            token = named.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if token not in vocabulary.every:
                    raise TokenizerError(
                        f"{kind}_token {token!r} is not in tokenizer.json",
                        where="special_tokens_map.json",
                        way_out="Add the token, or correct the map",
                    )
                value = vocabulary.every[token]
        result[kind] = _ids(kind, value, size)
    return result


def _ids(kind: str, value: Any, size: int) -> Any:
    where = f"{kind}_token_id"
    values = value if isinstance(value, list) else [] if value is None else [value]
    if isinstance(value, list) and kind != "eos":
        raise TokenizerError(f"is a list: {value!r:.80}", where=where, way_out="Only eos may have several ids")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < size:
            raise TokenizerError(f"{item!r:.80} is not an id below vocab_size {size}", where=where, way_out="Correct it")
    return values if kind == "eos" else values[0] if values else None
