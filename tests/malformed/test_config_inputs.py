"""BAD_INPUTS, row Config: every JSON document of a package is strict, and the decoder's config can be built."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.errors import ConfigError, ExportError, PackageError, WeightsError
from exporters.strict_json import MAX_JSON_DEPTH, parse_json, read_json
from exporters.student import load_student
from tests.malformed.packages import edit_json, load_refused, refused, relist
from tests.refusals import raises

DOCUMENTS = [
    "config.json",
    "generation_config.json",
    "package.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
    "discretizers/image/config.json",
    "discretizers/audio/config.json",
    "model.safetensors.index.json",
    "samples/tokenizer_golden.json",
]
BROKEN = {
    "bom": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "utf16": ("{}".encode("utf-16"), "byte-order mark"),
    "latin1": (b'{"a": "\xe9"}', "UTF-8"),
    "surrogate": (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
    "twice": (b'{"a": 1, "a": 2}', "twice"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "overflow": (b'{"a": 1e999}', "not finite"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    "truncated": (b'{"a": ', "not JSON"),
    "trailing": (b"{} {}", "not JSON"),
    "comment": (b"{/* */}", "not JSON"),
    "list": (b"[]", "not an object"),
    "string": (b'"x"', "not an object"),
    "empty": (b"", "not JSON"),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_strict_json(package: Path, name: str, damage: str) -> None:
    raw, word = BROKEN[damage]
    (package / name).write_bytes(raw)
    if name != "package.json":
        relist(package)
    load_refused(package, ConfigError, Path(name).name, word)


@pytest.mark.parametrize("where", ["a", "b.c"])
def test_a_duplicate_key_is_found_at_any_depth(where: str) -> None:
    text = {"a": '{"k": 1, "k": 1}', "b.c": '{"x": [{"k": {"k": 0}}, {"k": 1, "k": 2}]}'}[where]
    refused(ConfigError, "'k'", "twice", action=lambda: parse_json(text.encode(), where))


def test_brackets_in_strings_are_not_depth() -> None:
    text = json.dumps({"a": "[" * 1000 + '"' + "{" * 1000, "b\\": "\\"})
    assert parse_json(text.encode(), "x") == json.loads(text)
    nested = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(nested.encode(), "x") == json.loads(nested)


@pytest.mark.parametrize("text", ['"' + '\\"' * 500_000, '"' * 500_001, "[" + '"a",' * 300_000, "\\" * 1_000_000])
def test_odd_text_takes_linear_time(text: str) -> None:
    start = time.monotonic()
    with raises(ConfigError):
        parse_json(text.encode(), "x")
    assert time.monotonic() - start < 20  # quadratic would take hours


def test_a_document_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(ConfigError, "config.json", "larger than", action=lambda: read_json(path))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
@settings(max_examples=200, deadline=None)
def test_valid_json_parses_as_json_does(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raw = json.dumps(value).encode()
    assert parse_json(raw, "x") == value


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    try:
        parse_json(raw, "x")
    except ConfigError as error:
        assert error.way_out


DIMENSIONS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("value", [0, -4, 2.5, 64.0, "64", True, [64], 10**30])
@pytest.mark.parametrize("key", DIMENSIONS)
def test_a_dimension_that_cannot_be(package: Path, key: str, value: object) -> None:
    edit_json(package / "config.json", lambda config: config.update({key: value}))
    load_refused(relist(package), ConfigError, "config.json", key)


@pytest.mark.parametrize("value", [0, -1, 1.5, "136", None, True, 10**30])
def test_a_vocabulary_size_that_cannot_be(package: Path, value: object) -> None:
    edit_json(package / "config.json", lambda config: config.update(vocab_size=value))
    load_refused(relist(package), PackageError, "config.json", "vocab_size")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_dimension_that_is_absent_is_not_guessed(package: Path, key: str) -> None:
    edit_json(package / "config.json", lambda config: config.pop(key))
    load_refused(relist(package), ConfigError, "config.json", key)


def test_heads_that_do_not_divide_the_hidden_size(package: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["num_attention_heads"], config["num_key_value_heads"] = 3, 3
        del config["head_dim"]

    edit_json(package / "config.json", change)
    load_refused(relist(package), ConfigError, "num_attention_heads 3", "hidden_size 64")


def test_groups_that_do_not_divide_the_heads(package: Path) -> None:
    edit_json(package / "config.json", lambda config: config.update(num_key_value_heads=3))
    load_refused(relist(package), ConfigError, "num_key_value_heads 3")


def test_an_odd_head_width(package: Path) -> None:
    edit_json(package / "config.json", lambda config: config.update(head_dim=15))
    load_refused(relist(package), ConfigError, "head_dim 15")


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0},
        {"rms_norm_eps": -1e-6},
        {"rope_theta": "big"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"num_local_experts": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"layer_types": ["full_attention"] * 5000},
        {"hidden_act": "no_such_function"},
        {"attn_implementation": "someone/kernels"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_fields_that_cannot_be_built(package: Path, change: dict[str, Any]) -> None:
    edit_json(package / "config.json", lambda config: config.update(change))
    load_refused(relist(package), ConfigError, "config.json")


def test_a_vocabulary_that_is_not_the_embedding(package: Path) -> None:
    edit_json(package / "config.json", lambda config: config.update(vocab_size=137))
    load_refused(relist(package), WeightsError, "model.embed_tokens.weight", "[137, 64]")


def test_more_layers_than_the_checkpoint_has(package: Path) -> None:
    edit_json(package / "config.json", lambda config: config.update(num_hidden_layers=3))
    load_refused(relist(package), WeightsError, "model.layers.2")


def test_fewer_layers_than_the_checkpoint_has(package: Path) -> None:
    edit_json(package / "config.json", lambda config: config.update(num_hidden_layers=1))
    load_refused(relist(package), WeightsError, "model.layers.1", "does not have")


REMOTE: list[dict[str, Any]] = [
    {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
    {"trust_remote_code": True},
    {"text_config": {"auto_map": {"AutoConfig": "evil--evil.Config"}}},
    {"parts": [{"auto_map": {}}]},
]


@pytest.mark.parametrize("change", REMOTE, ids=range(len(REMOTE)))
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer/tokenizer_config.json", "discretizers/image/config.json"],
)
def test_remote_code_is_refused_and_never_run(package: Path, name: str, change: dict[str, Any]) -> None:
    ran = package.parent / "ran"
    code = f"open({str(ran)!r}, 'w')"
    for folder in (package, package / "tokenizer", package / "discretizers" / "image"):
        (folder / "modeling_evil.py").write_text(code)
    edit_json(package / name, lambda config: config.update(change))
    load_refused(relist(package), ConfigError, Path(name).name, "code" if "parts" not in change else "auto_map")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("kind", "nearest"), [("lama", "llama"), ("qwen_3", "qwen3"), ("Qwen3", "qwen3"), ("../llama", "llama")]
)
def test_an_unknown_model_type_lists_the_nearest(package: Path, kind: str, nearest: str) -> None:
    edit_json(package / "config.json", lambda config: config.update(model_type=kind))
    load_refused(relist(package), ConfigError, "model_type", repr(kind), nearest)


@pytest.mark.parametrize("kind", [None, 5, ["llama"], "", "vit", "x" * 10_000])
def test_a_model_type_that_is_none(package: Path, kind: object) -> None:
    edit_json(package / "config.json", lambda config: config.update(model_type=kind))
    load_refused(relist(package), ConfigError, "model_type")


@given(
    st.dictionaries(
        st.sampled_from([*DIMENSIONS, "vocab_size", "rope_scaling", "hidden_act", "pad_token_id"]),
        st.none()
        | st.integers(-2, 300)
        | st.floats(-2, 300)
        | st.text(max_size=5)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor"]), st.integers(-1, 9))
        | st.lists(st.integers(-1, 9), max_size=3),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_config_loads_or_is_refused(tiny_config: dict[str, Any], change: dict[str, Any]) -> None:
    from exporters.model_config import check_model_config, skeleton

    config = tiny_config | change
    try:
        check_model_config(config)
        assert skeleton(config).parameters
    except ExportError as error:
        assert error.way_out


@pytest.fixture(scope="module")
def tiny_config(tiny_student: Path) -> dict[str, Any]:
    """config.json of the tiny student."""
    return load_student(tiny_student).config
