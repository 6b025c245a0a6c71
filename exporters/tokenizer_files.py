"""Tokenizer files: checked as data, tried in a process of their own, and the ids of the special tokens.

tokenizer.json is the format of the `tokenizers` library. Chat templates are neither read nor rendered.
`samples/tokenizer_golden.json` (optional: {"cases": [{"text", "ids"}]}) pins the ids that training saw.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from exporters import tokenizer_probe
from exporters.errors import TokenizerError
from exporters.modality_table import Modality
from exporters.package import Package
from exporters.strict_json import read_json

GOLDEN = "samples/tokenizer_golden.json"
MAX_TOKEN_BYTES = 4096
PROBE_SECONDS = 30.0
_PROBE_MEMORY = 4 << 30
# Texts on which a pattern with nested repeats shows itself: long runs, and runs that end in a mismatch.
_PROBES = [run * 60 + tail for run in ("a", "aB", " ", "1", "\n", "é", "-", "\t x") for tail in ("", "!", "\x00")]


@dataclass(frozen=True)
class Vocabulary:
    """Token text -> id, from tokenizer.json: the model's own entries, and those plus the added tokens."""

    model: Mapping[str, int]
    every: Mapping[str, int]


def _refuse(what: str, where: str, way_out: str = "Save the tokenizer again with the tokenizers library") -> NoReturn:
    raise TokenizerError(what, where=where, way_out=way_out)


def _model_vocab(document: Mapping[str, Any], where: str) -> dict[str, int]:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [token, score] at position id
        if not all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab):
            _refuse("model.vocab is not a list of [token, score]", where)
        if len({entry[0] for entry in vocab}) != len(vocab):
            _refuse("model.vocab lists a token twice", where)
        return {entry[0]: index for index, entry in enumerate(vocab)}
    if not isinstance(vocab, dict):
        _refuse("has no model.vocab", where)
    return vocab


def _added_tokens(document: Mapping[str, Any], where: str) -> dict[str, int]:
    added = document.get("added_tokens") or []
    if not isinstance(added, list):
        _refuse("added_tokens is not a list", where)
    result: dict[str, int] = {}
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            _refuse("added_tokens holds an entry without id and content", where)
        if entry["content"] in result:
            _refuse(f"added_tokens lists {entry['content']!r:.80} twice", where, "Keep one of them")
        result[entry["content"]] = entry["id"]
    return result


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose ids are unique, without holes, and below `vocab_size`."""
    where = path.name
    document = read_json(path)
    model, added = _model_vocab(document, where), _added_tokens(document, where)
    owner: dict[int, str] = {}
    for token, index in [*model.items(), *added.items()]:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocab_size:
            _refuse(
                f"the id of {token!r:.80} is {index!r:.40}, vocab_size is {vocab_size}",
                where,
                "Take the tokenizer and config.json from one release",
            )
        if len(token.encode("utf-8", "surrogatepass")) > MAX_TOKEN_BYTES:
            _refuse(f"the token {token[:40]!r}... is {len(token)} characters long", where, "Remove it")
        if owner.setdefault(index, token) != token:
            _refuse(f"{owner[index]!r:.80} and {token!r:.80} share the id {index}", where, "Give each its own id")
        if added.get(token, index) != index:
            _refuse(f"{token!r:.80} has the ids {model[token]} and {added[token]}", where, "Keep one of them")
    if not model:
        _refuse("model.vocab is empty", where)
    if missing := next((index for index in range(max(model.values())) if index not in owner), None):
        _refuse(f"no token has the id {missing}", where, "Number the vocabulary without holes")
    return Vocabulary(model, {**model, **added})


def check_modalities(vocabulary: Vocabulary, modalities: Mapping[str, Modality], special: Mapping[str, Any]) -> None:
    """Text ids all exist; no text token and no special token has an id that stands for a code."""
    ids = set(vocabulary.every.values())
    text = modalities.get("text")
    if text is not None and (missing := next((i for i in range(text.first, text.end) if i not in ids), None)):
        _refuse(f"no token has the id {missing}, which is in text's range", "tokenizer.json", "Correct the range")
    reserved = [*special["eos"], special["bos"], special["pad"]]
    for name, entry in modalities.items():
        if name == "text":
            continue
        wrapping = [index for other in modalities.values() for index in (other.begin_id, other.end_id)]
        for index in [*vocabulary.model.values(), *reserved, *wrapping]:
            if index is not None and entry.first <= index < entry.end:
                _refuse(
                    f"the id {index} is a token of its own and also a code of {name} [{entry.first}, {entry.end})",
                    "tokenizer.json",
                    "Move the range past the tokenizer's vocabulary",
                )


def encode_apart(path: Path, texts: Sequence[str], seconds: float = PROBE_SECONDS) -> list[list[int]]:
    """Token ids of `texts`, made by a separate process with a limit on time and memory.

    Raises TokenizerError when it takes longer than `seconds` or the library refuses the file.
    """
    probe = [
        sys.executable,
        "-I",
        str(tokenizer_probe.__file__),
        str(path),
        str(_PROBE_MEMORY),
        str(math.ceil(seconds)),
    ]
    environment = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            probe, input=json.dumps(list(texts)).encode(), capture_output=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        _refuse(
            f"tokenising {len(texts)} short texts took more than {seconds:g} s",
            path.name,
            "One of its patterns backtracks without end: simplify normalizer and pre_tokenizer",
        )
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        _refuse(f"the tokenizers library refuses it: {(lines or ['it was killed'])[-1][:300]}", path.name)
    return json.loads(done.stdout)


def check_tokenizer(path: Path, golden: Path | None, vocab_size: int, seconds: float = PROBE_SECONDS) -> None:
    """Try the tokenizer on hard texts, and on the golden ones, whose ids must be those that training saw."""
    cases = _golden_cases(golden) if golden else []
    encoded = encode_apart(path, [*_PROBES, *(text for text, _ in cases)], seconds)
    if any(index >= vocab_size for ids in encoded for index in ids):
        _refuse(f"gives ids past vocab_size {vocab_size}", path.name)
    for (text, wanted), found in zip(cases, encoded[len(_PROBES) :], strict=True):
        if found != wanted:
            _refuse(
                f"{text!r:.80} gives {found[:20]}, training saw {wanted[:20]}",
                GOLDEN,
                "Take the tokenizer of the release, and the pinned version of the tokenizers library",
            )


def _golden_cases(path: Path) -> list[tuple[str, list[int]]]:
    cases = read_json(path).get("cases")
    if not isinstance(cases, list) or not all(
        isinstance(case, dict) and set(case) == {"text", "ids"} for case in cases
    ):
        _refuse("cases is not a list of {text, ids}", GOLDEN, "Write it as the format says")
    if not all(isinstance(case["text"], str) and isinstance(case["ids"], list) for case in cases):
        _refuse("holds a text that is not a string, or ids that are not a list", GOLDEN, "Write it as the format says")
    return [(case["text"], case["ids"]) for case in cases]


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
        given = [item[f"{kind}_token_id"] for item in sources if item.get(f"{kind}_token_id") is not None]
        for value in given:
            _check_ids(kind, value, size)
        value = given[0] if given else _named_id(named.get(f"{kind}_token"), kind, vocabulary)
        if kind == "eos":
            result[kind] = value if isinstance(value, list) else [] if value is None else [value]
        else:
            result[kind] = value
    return result


def _named_id(token: Any, kind: str, vocabulary: Vocabulary | None) -> int | None:
    token = token.get("content") if isinstance(token, dict) else token
    if token is None or vocabulary is None:
        return None
    if not isinstance(token, str) or token not in vocabulary.every:
        _refuse(
            f"{kind}_token {token!r:.80} is not in tokenizer.json",
            "special_tokens_map.json",
            "Add the token, or correct the map",
        )
    return vocabulary.every[token]


def _check_ids(kind: str, value: Any, size: int) -> None:
    if isinstance(value, list) and kind != "eos":
        _refuse(f"is a list: {value!r:.80}", f"{kind}_token_id", "Only eos may have several ids: give one")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < size:
            _refuse(f"{item!r:.80} is not an id below vocab_size {size}", f"{kind}_token_id", "Correct it")


def check_added_tokens(path: Path, vocabulary: Vocabulary) -> None:
    """added_tokens.json repeats ids of tokenizer.json; refuse it when the two disagree."""
    for token, index in read_json(path).items():
        if vocabulary.every.get(token) != index:
            _refuse(
                f"says {token!r:.80} is {index!r:.40}, tokenizer.json says {vocabulary.every.get(token)}",
                path.name,
                "Take both from one release",
            )
