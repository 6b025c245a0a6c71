"""Language models that cannot be exported faithfully: a refusal names the field or the module, why, and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.errors import ConfigError, ExportError, QuantizationError
from exporters.families.decoder_lm import capture_lm
from exporters.families.unsupported import UnsupportedModule
from exporters.student import load_student
from tests.exporters.families_maker import CASES, LONGROPE, Case, quantise, write
from tests.refusals import raises
from tools.family_matrix import CAPACITY

#: name -> (model_type, options, module path, class or cause that the message names, what of it the way out says)
REFUSED: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "dynamic rope beyond": (
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0), max_position_embeddings=32),
        "model.rotary_emb",
        "RoPE type 'dynamic' changes with the sequence length within 48 positions",
        "--context 32",
    ),
    "longrope beyond": (
        "phi3",
        LONGROPE | dict(original_max_position_embeddings=16),
        "model.rotary_emb",
        "RoPE type 'longrope' changes with the sequence length within 48 positions",
        "--context 16",
    ),
    "bidirectional": (
        "gemma3_text",
        dict(use_bidirectional_attention=True),
        "model.layers.0.self_attn",
        "neither causal nor a causal sliding window",
        "Supported",
    ),
    "latent attention": ("deepseek_v3", {}, "model.layers.0.self_attn", "DeepseekV3Attention", "Supported"),
    "shared keys and values": ("gemma4_text", {}, "config.json: num_kv_shared_layers", "6 layers attend", "Supported"),
    "linear attention": ("qwen3_next", {}, "model.layers.0.linear_attn", "Qwen3NextGatedDeltaNet", "Supported"),
    "sinks": ("gpt_oss", {}, "model.layers.0.mlp.experts", "GptOssExperts", "Supported"),
    "alibi": ("falcon", dict(alibi=True), "attention_mask", "ALiBi", "Supported"),
    "alibi in the scores": ("bloom", dict(hidden_size=64), "layer 0", "'baddbmm' with its keys", "Supported"),
    "too few positions": (
        "gpt2",
        dict(max_position_embeddings=32),
        "transformer.wpe",
        "has 32 rows, and the context 48 positions",
        "--context 32",
    ),
    "too few sines": ("codegen", dict(max_position_embeddings=32), "transformer.h.0.attn.embed", "32 rows", "32"),
    "positions of its own": ("blenderbot-small", {}, "model.decoder.embed_positions", "it counts itself", "Supported"),
    "own masks in windows": ("gpt_neo", {}, "layer 0", "'dtype' with its scores", "Supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_is_not_understood_is_named(name: str, tmp_path: Path) -> None:
    kind, options, where, what, way_out = REFUSED[name]
    write(Case(kind, options), tmp_path)
    student = load_student(tmp_path)
    with raises(UnsupportedModule) as caught:
        capture_lm(student, CAPACITY)
    assert caught.value.where.startswith(where)
    assert what in f"{caught.value.where} {caught.value.what}"
    assert way_out in caught.value.way_out


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_familys_own_names_of_dimensions_are_read(tmp_path: Path) -> None:
    write(CASES["gpt2"], tmp_path)
    assert "hidden_size" not in json.loads((tmp_path / "config.json").read_text())
    load_student(tmp_path)
    edited(tmp_path, lambda config: config.update(n_embd=-4))
    with raises(ConfigError, match="hidden_size is -4"):
        load_student(tmp_path)


def test_two_names_of_one_dimension_that_contradict_are_refused(tmp_path: Path) -> None:
    write(CASES["gpt2"], tmp_path)
    edited(tmp_path, lambda config: config.update(hidden_size=48))
    with raises(ConfigError, match="hidden_size says 48, n_embd says 64"):
        load_student(tmp_path)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "theta": ("llama", dict(rope_theta=7.0), "rope_theta"),
    "scaling": ("llama", dict(rope_scaling=dict(type="linear", factor=4.0)), "rope_scaling.type"),
    "factor": ("llama-linear", dict(rope_scaling=dict(type="linear", factor=4.0)), "rope_scaling.factor"),
    "local table": ("gemma3", dict(rope_local_base_freq=7.0), "rope_local_base_freq"),
    "part of a head": ("phi3-partial", dict(partial_rotary_factor=0.25), "partial_rotary_factor"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_two_spellings_of_rope_that_contradict_are_refused(name: str, tmp_path: Path) -> None:
    case, change, field = CONTRADICTIONS[name]
    write(CASES[case], tmp_path)
    edited(tmp_path, lambda config: config.update(change))
    with raises(ConfigError) as caught:
        load_student(tmp_path)
    assert caught.value.where == "config.json" and field in caught.value.what and "rope_parameters" in caught.value.what


def test_two_spellings_that_agree_are_taken(tmp_path: Path) -> None:
    write(CASES["llama-linear"], tmp_path)
    edited(tmp_path, lambda c: c.update(rope_theta=100.0, rope_scaling=dict(type="linear", factor=3.0)))
    held = load_student(tmp_path).config["rope_parameters"]
    assert (held["rope_type"], held["rope_theta"], held["factor"]) == ("linear", 100.0, 3.0)


def test_a_wrapper_around_a_decoder_says_where_it_is(tmp_path: Path) -> None:
    write(CASES["gemma3"], tmp_path)
    edited(tmp_path, lambda c: c.update(model_type="gemma3", text_config=dict(c)))
    with raises(ConfigError, match=r"gemma3.*text_config.*Save the decoder alone \(gemma3_text\)"):
        load_student(tmp_path)


@pytest.mark.parametrize("part", ["gate_up_proj_packed", "down_proj_blocks", "gate_up_proj"])
def test_experts_quantised_as_one_tensor_are_refused(part: str, tmp_path: Path) -> None:
    write(CASES["qwen3_moe"], tmp_path)
    path = tmp_path / "model.safetensors"
    prefix = "model.layers.1.mlp.experts."
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefix)}
    tensors[prefix + part] = torch.zeros(4, 48, 20, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with raises(ExportError) as caught:
        load_student(tmp_path)
    assert prefix + part in str(caught.value) and caught.value.way_out
    if part != "gate_up_proj":
        assert isinstance(caught.value, QuantizationError)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    write(Case("qwen3_moe", dict(hidden_size=48, moe_intermediate_size=32)), tmp_path)
    quantise(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.2.down_proj.weight_packed"
    save_file({key: t for key, t in load_file(path).items() if key != name}, path, metadata={"format": "pt"})
    with raises(ExportError, match=r"experts\.2\.down_proj\.weight_packed.*is missing"):
        load_student(tmp_path)
