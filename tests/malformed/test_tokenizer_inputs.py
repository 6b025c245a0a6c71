"""BAD_INPUTS, row Tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.errors import ConfigError, TokenizerError
from exporters.student import load_student
from exporters.tokenizer_files import check_tokenizer
from tests.malformed.packages import edit_json, load_refused, refused, relist

FILE = "tokenizer/tokenizer.json"
Change = Callable[[dict[str, Any]], object]


def _vocab(**entries: object) -> Change:
    return lambda document: document["model"]["vocab"].update(entries)


def _drop(index: int) -> Change:
    def change(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        del vocab[next(token for token, value in vocab.items() if value == index)]
        document["model"]["merges"] = []

    return change


IDS: list[tuple[str, Change, str]] = [
    ("shared", _vocab(zzz=3), "share the id 3"),
    ("shared with a special", _vocab(zzz=64), "share the id 64"),
    ("missing", _drop(5), "no token has the id 5"),
    ("past the end", _vocab(zzz=136), "vocab_size is 136"),
    ("negative", _vocab(zzz=-1), "-1"),
    ("not whole", _vocab(zzz=1.5), "1.5"),
    ("text", _vocab(zzz="7"), "'7'"),
    ("truth", _vocab(zzz=True), "True"),
    ("a code", lambda d: d["model"]["vocab"].update({f"x{i}": i for i in range(72, 80)}), "code of image"),
    ("no vocab", lambda d: d["model"].pop("vocab"), "model.vocab"),
    ("no model", lambda d: d.pop("model"), "model.vocab"),
    ("added twice", lambda d: d["added_tokens"].append(d["added_tokens"][0]), "twice"),
    ("added shares", lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"content": "q!"}), "share the id 64"),
    ("added nameless", lambda d: d["added_tokens"].append({"id": 71}), "without id and content"),
    ("added is text", lambda d: d.update(added_tokens="x"), "not a list"),
    ("no wrapping token", lambda d: d["added_tokens"].pop(3), "<image>"),
]


@pytest.mark.parametrize(("change", "word"), [row[1:] for row in IDS], ids=[row[0] for row in IDS])
def test_ids_that_do_not_hold(package: Path, change: Change, word: str) -> None:
    edit_json(package / FILE, change)
    load_refused(relist(package), TokenizerError, word)


def test_the_same_token_twice_in_the_vocabulary(package: Path) -> None:
    text = (
        (package / FILE)
        .read_text()
        .replace('"vocab":{', '"vocab":{"a":0,', 1)
        .replace('"vocab": {', '"vocab": {"a":0,', 1)
    )
    (package / FILE).write_text(text)
    load_refused(relist(package), ConfigError, "tokenizer.json", "'a'", "twice")


def _split(pattern: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda document: document.update(pre_tokenizer=split)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", r"(\s*)*\S{1000}", "(?=(a+)+!!)"])
def test_a_pattern_that_never_ends(package: Path, pattern: str) -> None:
    edit_json(package / FILE, _split(pattern))
    start = time.monotonic()
    load_refused(relist(package), TokenizerError, "tokenizer.json", "refuses")
    assert time.monotonic() - start < 60


def test_a_tokenizer_that_takes_too_long_is_named(package: Path) -> None:
    refused(
        TokenizerError,
        "tokenizer.json",
        "took more than",
        action=lambda: check_tokenizer(package / FILE, None, 136, seconds=0.001),
    )


@pytest.mark.parametrize("pattern", ["(", "(?P<x", "[", "a{99999999999}"])
def test_a_pattern_that_does_not_compile(package: Path, pattern: str) -> None:
    edit_json(package / FILE, _split(pattern))
    load_refused(relist(package), TokenizerError, "tokenizer.json", "refuses")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(type="Evil"),
        lambda d: d.update(pre_tokenizer={"type": "Evil"}),
        lambda d: d["model"].update(merges=[["nope", "neither"]]),
        lambda d: d.update(normalizer=5),
        lambda d: d.update(version="9.9"),
    ],
)
def test_content_that_the_library_refuses(package: Path, change: Change) -> None:
    edit_json(package / FILE, change)
    load_refused(relist(package), TokenizerError, "tokenizer.json", "refuses")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["pad", "bos"])
def test_a_list_valued_id(package: Path, name: str, kind: str) -> None:
    edit_json(package / name, lambda config: config.update({f"{kind}_token_id": [66]}))
    load_refused(relist(package), TokenizerError, f"{kind}_token_id", "list")


@pytest.mark.parametrize("value", [-1, 136, 1.0, "65", True, [65, 999], [[65]], {"id": 65}])
def test_an_end_token_that_cannot_be(package: Path, value: object) -> None:
    edit_json(package / "generation_config.json", lambda config: config.update(eos_token_id=value))
    load_refused(relist(package), TokenizerError, "eos_token_id")


def test_a_list_of_end_tokens_is_fine(package: Path) -> None:
    edit_json(package / "generation_config.json", lambda config: config.update(eos_token_id=[65, 68]))
    assert load_student(relist(package)).special == {"bos": 64, "eos": [65, 68], "pad": 66}


def test_an_end_token_that_is_a_code(package: Path) -> None:
    edit_json(package / "generation_config.json", lambda config: config.update(eos_token_id=[65, 80]))
    load_refused(relist(package), TokenizerError, "80", "code of image")


def test_special_tokens_by_name(package: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(package / name, lambda c: [c.pop(f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")])
    mapping = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"}
    (package / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(mapping))
    assert load_student(relist(package)).special == {"bos": 64, "eos": [65], "pad": None}


def test_a_special_token_by_name_that_is_not_there(package: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(package / name, lambda config: config.pop("bos_token_id"))
    edit_json(package / "tokenizer" / "special_tokens_map.json", lambda m: m.update(bos_token="<s>"))
    load_refused(relist(package), TokenizerError, "<s>", "special_tokens_map.json")


def test_added_tokens_that_disagree(package: Path) -> None:
    edit_json(package / "tokenizer" / "added_tokens.json", lambda m: m.update({"<image>": 70}))
    load_refused(relist(package), TokenizerError, "added_tokens.json", "<image>")


def test_a_chat_template_is_never_rendered(package: Path) -> None:
    bomb = "{% for a in range(100000000) %}{% for b in range(100000000) %}x{% endfor %}{% endfor %}{{ 1 / 0 }}"
    edit_json(package / "tokenizer" / "tokenizer_config.json", lambda config: config.update(chat_template=bomb))
    (package / "tokenizer" / "chat_template.jinja").write_text(bomb)
    start = time.monotonic()
    assert load_student(relist(package)).tokenizer == package / FILE
    assert time.monotonic() - start < 60


def test_a_token_of_a_hundred_megabytes(package: Path) -> None:
    edit_json(package / FILE, lambda document: document["model"]["vocab"].update({"x": 71}))
    with (package / FILE).open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + 100_000_000)
    load_refused(relist(package), ConfigError, "tokenizer.json", "larger than")


def test_a_token_of_a_megabyte(package: Path) -> None:
    edit_json(package / FILE, lambda document: document["added_tokens"].append({"id": 71, "content": "y" * 1_000_000}))
    load_refused(relist(package), TokenizerError, "tokenizer.json", "1000000 characters")


def test_golden_ids_that_drift(package: Path) -> None:
    golden = package / "samples" / "tokenizer_golden.json"
    edit_json(golden, lambda document: document["cases"][1]["ids"].append(3))
    load_refused(relist(package), TokenizerError, "tokenizer_golden.json", "'say three'")


def test_a_tokenizer_whose_merges_changed_drifts(package: Path) -> None:
    edit_json(package / FILE, lambda document: document["model"].update(merges=document["model"]["merges"][:-6]))
    load_refused(relist(package), TokenizerError, "tokenizer_golden.json", "training saw")


@pytest.mark.parametrize(
    "cases", [5, [{"text": "a"}], [{"text": 1, "ids": []}], [{"text": "a", "ids": 5}], {"text": "a"}]
)
def test_golden_cases_that_are_malformed(package: Path, cases: object) -> None:
    (package / "samples" / "tokenizer_golden.json").write_text(json.dumps({"cases": cases}))
    load_refused(relist(package), TokenizerError, "tokenizer_golden.json")
