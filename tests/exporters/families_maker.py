"""Small random checkpoints of language-model families, the cases that they are tested in, and ways to run them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file

from device_profiles import load_profile
from exporters.backends import Job, Kind, load_exporter
from exporters.program import Program
from runtimes.bundle import FileInfo
from runtimes.session import CheckedSession, open_session
from tests.bundle_maker import make_bundle
from tools.family_matrix import CAPACITY, VOCAB, random_model, tiny_config

#: The sizes below are odd on purpose: head_dim is not hidden / heads, hidden no power of two, the vocabulary no
#: multiple of 32. Windows are 7 positions, so the chunks of 24 and 8 cross them.
CHUNKS = (24, 8, 1, 1, 6)
SINGLE = (1,) * 20


@dataclass(frozen=True)
class Case:
    """One family in one variant.

    Attributes:
        operators: what the fused ONNX form of it must hold, and how often (3 layers). ONNX Runtime's attention takes
            heads whose width is a multiple of 8: the cases without it have heads of 10, and are decomposed.
    """

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, **more))


LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=8)
LONGROPE = dict(
    rope_parameters=dict(
        rope_type="longrope", rope_theta=100.0, short_factor=[1.0 + i / 8 for i in range(5)], long_factor=[3.0] * 5
    ),
    original_max_position_embeddings=64,
    max_position_embeddings=256,
)
PARTIAL = dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5))
GQA, MIXED = {"GroupQueryAttention": 3}, ["full_attention", "sliding_attention", "full_attention"]

CASES: Mapping[str, Case] = {
    "llama": Case("llama", dict(tie_word_embeddings=False), GQA),
    "llama-biases-tied": Case("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), GQA),
    "llama-llama3": Case("llama", LLAMA3 | dict(num_key_value_heads=1), GQA),
    "llama-yarn": Case("llama", YARN, GQA),
    "llama-linear": Case("llama", _rope("linear", factor=3.0), GQA),
    "llama-dynamic-within": Case("llama", _rope("dynamic", factor=2.0), GQA),
    "qwen2": Case("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-windows": Case(
        "qwen2", dict(hidden_size=64, use_sliding_window=True, sliding_window=7, max_window_layers=1), GQA
    ),
    "qwen3": Case("qwen3", dict(head_dim=24, attention_bias=True), GQA | {"RMSNormalization": 7}),
    "mistral": Case("mistral", dict(sliding_window=7), GQA),
    "gemma": Case("gemma", {}, GQA),
    "gemma2": Case("gemma2", dict(query_pre_attn_scalar=24), GQA),
    "gemma2-small-caps": Case("gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0), GQA),
    "gemma3": Case("gemma3_text", dict(layer_types=MIXED), GQA),
    "gemma3-scaled": Case(
        "gemma3_text",
        dict(
            layer_types=MIXED,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
                "sliding_attention": dict(rope_type="default", rope_theta=100.0),
            },
            query_pre_attn_scalar=24,
            tie_word_embeddings=False,
        ),
        GQA,
    ),
    "smollm3": Case("smollm3", dict(hidden_size=64, no_rope_layers=[1, 0, 1], tie_word_embeddings=True), GQA),
    "phi3": Case("phi3", dict(hidden_size=64, sliding_window=None), GQA | {"Neg": 0}),
    "phi3-partial": Case("phi3", PARTIAL | dict(hidden_size=64, sliding_window=7), GQA),
    "phi3-longrope-short": Case("phi3", LONGROPE | dict(sliding_window=None)),
    "phi": Case("phi", dict(hidden_size=64), GQA),
    "stablelm": Case("stablelm", {}),
    "gpt_neox": Case("gpt_neox", {}),
    "gpt2": Case("gpt2", dict(hidden_size=64), GQA),
    "gpt2-scaled-by-layer": Case("gpt2", dict(scale_attn_by_inverse_layer_idx=True, activation_function="relu")),
    "gpt_bigcode": Case("gpt_bigcode", dict(hidden_size=64), GQA),
    "gpt_bigcode-all-heads": Case("gpt_bigcode", dict(multi_query=False)),
    "opt": Case("opt", dict(hidden_size=64, word_embed_proj_dim=64), GQA),
    "opt-projected": Case("opt", dict(word_embed_proj_dim=24, do_layer_norm_before=False)),
    "biogpt": Case("biogpt"),
    "falcon": Case("falcon", dict(hidden_size=64), GQA),
    "falcon-groups": Case("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon-all-heads": Case("falcon", dict(multi_query=False, parallel_attn=False)),
    "gptj": Case("gptj", {}, GQA),
    "codegen": Case("codegen", {}, GQA),
    "olmo2": Case("olmo2", dict(hidden_size=64), GQA),
    "granite": Case(
        "granite",
        dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.25),
    ),
    "qwen3_moe": Case("qwen3_moe", dict(head_dim=16, norm_topk_prob=True), GQA),
    "qwen3_moe-dense-layer": Case("qwen3_moe", dict(norm_topk_prob=False, mlp_only_layers=[1])),
    "mixtral": Case("mixtral", dict(sliding_window=7), GQA),
    "qwen2_moe": Case("qwen2_moe", dict(shared_expert_intermediate_size=32)),
}


def tokens(count: int) -> np.ndarray:
    """Ids [1, count] without the special ones."""
    return np.random.default_rng(0).integers(3, VOCAB, (1, count)).astype(np.int32)


def write(case: Case, folder: Path) -> torch.nn.Module:
    """Saves a random checkpoint of the case as transformers saves it; returns the model."""
    model = random_model(tiny_config(case.model_type, dict(case.options)))
    model.save_pretrained(folder)
    return model


def expected(model: torch.nn.Module, ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits [len(chunks), V] at the end of each chunk, by transformers' eager forward of the whole sequence."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits[0].numpy()
    return logits[np.cumsum(chunks) - 1]


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error as a share of the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def quantise(folder: Path, group: int = 16) -> None:
    """Rewrites the checkpoint with 4-bit projections (experts too), as compressed-tensors packs them."""
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        left = ("embed", "lm_head", "norm", "router", "mlp.gate.", "moe.gate.", "shared_expert_gate")
        if kind != "weight" or weight.ndim != 2 or any(part in name for part in left):
            tensors[name] = weight
            continue
        blocks = weight.reshape(weight.shape[0], -1, group)
        scales = blocks.abs().amax(-1).clamp_min(1e-6) / 7
        codes = (blocks / scales[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, dynamic=False)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    (folder / "config.json").write_text(json.dumps(config))


#: backend -> the profile that its artifacts are made for
PROFILES = {"onnx": "host", "openvino": "host", "tvm": "host", "coreml": "iphone-16-pro", "tensorrt": "jetson-orin"}


def opened(program: Program, backend: str, kind: Kind, folder: Path) -> CheckedSession:
    """A session of the artifact that a backend makes of a language model, in an empty folder."""
    exporter, profile = load_exporter(backend), load_profile(PROFILES[backend])
    assert exporter.unsupported(program, profile, kind) == []
    (artifact,) = exporter.export(Job(program, profile, folder, (kind,)))
    files = {file: FileInfo((folder / file).stat().st_size, "") for file in artifact.files}
    bundle = make_bundle(folder / "bundle")
    made = replace(bundle, folder=folder, files=files, artifacts=(artifact,), vocab_size=VOCAB, context=CAPACITY)
    return open_session(made, artifact, 1)


def steps(session: CheckedSession, ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits [len(chunks), V] after each chunk, after another sequence was in the cache."""
    session.reset()
    session.run({"ids": ids[:, ::-1].copy()})
    session.reset()
    rows, end = [], 0
    for size in chunks:
        end += size
        rows.append(np.array(session.run({"ids": ids[:, end - size : end]})["logits"][0]))
    return np.stack(rows)
