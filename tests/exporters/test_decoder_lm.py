"""Plain transformers checkpoints, as save_pretrained writes them: exported and run against transformers itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from device_profiles import load_profile
from exporters.backends import Job
from exporters.families.decoder_lm import capture_lm
from exporters.families.unsupported import UnsupportedModule
from exporters.onnx_ import OnnxExporter
from exporters.student import Student, load_student
from runtimes.bundle import Artifact
from runtimes.onnxruntime_ import OnnxRuntimeSession
from runtimes.session import Limits

CAPACITY, VOCAB = 32, 131
CHUNKS = (7, 1, 1, 5, 1, 1, 1)
FORMS = [("fused", "exact"), ("standard", "exact")]

#: head_dim differs from hidden_size / heads and the vocabulary is odd wherever the family lets it.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=3.0)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "llama, tied, one group": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama3 rope": ("llama", dict(rope_parameters=LLAMA3, num_key_value_heads=1)),
    "yarn rope": ("llama", dict(rope_parameters=YARN)),
    "linear rope": ("llama", dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, hidden_size=64, head_dim=None)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=24, attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=5, tie_word_embeddings=False)),
}


def write_checkpoint(folder: Path, kind: str, options: dict[str, Any]) -> torch.nn.Module:
    """A random model of the family, saved as transformers saves it; returns it in eval mode."""
    values = {key: value for key, value in (COMMON | options).items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms start as ones and biases as zeros, which would hide a mistake
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def export(student: Student, folder: Path) -> dict[str, Artifact]:
    """form -> artifact."""
    job = Job(capture_lm(student, CAPACITY), load_profile("host"), folder, FORMS)
    return {artifact.form: artifact for artifact in OnnxExporter().export(job)}


def computed(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Random ids int32 [1, tokens], and transformers' own logits [len(CHUNKS), V] after each chunk of them."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, sum(CHUNKS))).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits[0].numpy()
    return ids, logits[np.cumsum(CHUNKS) - 1]


def chunked(artifact: Artifact, folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [len(CHUNKS), V] after each chunk."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnxruntime.InferenceSession(folder / artifact.model, options, providers=["CPUExecutionProvider"])
    rows, ends = [], np.cumsum(CHUNKS)
    with OnnxRuntimeSession(model, artifact, Limits(CAPACITY, {"ids": VOCAB})) as session:
        session.run({"ids": ids[:, ::-1].copy()})  # what another sequence left in the cache must not matter
        session.reset()
        for end, size in zip(ends, CHUNKS, strict=True):
            rows.append(session.run({"ids": ids[:, end - size : end]})["logits"][0].copy())
    return np.stack(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    kind, options = FAMILIES[name]
    model = write_checkpoint(tmp_path / "checkpoint", kind, options)
    ids, expected = computed(model)
    assert np.abs(expected).max() > 1

    student = load_student(tmp_path / "checkpoint")
    assert not student.quantized and student.tokenizer is None
    artifacts = export(student, tmp_path)
    for artifact in artifacts.values():
        error = np.abs(chunked(artifact, tmp_path, ids) - expected).max() / np.abs(expected).max()
        assert error <= 1e-5, artifact.form
    fused, standard = artifacts["fused"].operators, artifacts["standard"].operators
    layers = model.config.num_hidden_layers
    assert fused["GroupQueryAttention"] == layers and standard["Attention"] == layers
    assert not {"Softmax", "Sin", "Cos", "ReduceMean", "Pow", "Where"} & set(fused)
    assert not {"GroupQueryAttention", "SkipSimplifiedLayerNormalization", "QuickGelu"} & set(standard)


@pytest.mark.parametrize("tables", ["mapped", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # the head's own table; that of the embeddings
def test_the_profile_says_whether_the_runtime_packs_float_tables(name: str, tables: str, tmp_path: Path) -> None:
    kind, options = FAMILIES[name]
    model = write_checkpoint(tmp_path / "checkpoint", kind, options)
    program = capture_lm(load_student(tmp_path / "checkpoint"), CAPACITY)
    profile = replace(load_profile("host"), float_tables=tables)
    [artifact] = OnnxExporter().export(Job(program, profile, tmp_path, [("fused", "exact")]))
    graph = onnx.load(tmp_path / artifact.model, load_external_data=False).graph
    # A table that could be replaced by a feed is no constant to ONNX Runtime, which packs constants.
    replaceable = {value.name for value in graph.input} & {tensor.name for tensor in graph.initializer}
    assert len(replaceable) == {"mapped": 1, "packed": 0}[tables]
    # One that it packs is let go of where nothing else reads it.
    readers = Counter(name for node in graph.node for name in node.input)
    factors = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")}
    packed = factors & {tensor.name for tensor in graph.initializer} - replaceable
    assert packed and {readers[name] for name in packed} == {1}
    ids, expected = computed(model)
    assert np.abs(chunked(artifact, tmp_path, ids) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_window_is_smaller_than_what_is_compared(tmp_path: Path) -> None:
    """Without its window mistral's logits differ, so the case above would notice if it were dropped."""
    model = write_checkpoint(tmp_path, "mistral", dict(sliding_window=5, tie_word_embeddings=False))
    ids = torch.arange(sum(CHUNKS))[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        model.config.sliding_window = None
        after = model(ids, use_cache=False).logits
    assert (before[:, :5] - after[:, :5]).abs().max() < 1e-5
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "options", "where", "what"),
    [
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0),
                       max_position_embeddings=16),
         "model.rotary_emb", "RoPE type 'dynamic' changes with the sequence length"),
    ],
    ids=["rope by length"],
)  # fmt: skip
def test_what_cannot_be_exported_faithfully_is_refused(kind, options, where, what, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kind, options)
    student = load_student(tmp_path)
    with pytest.raises(UnsupportedModule) as caught:
        capture_lm(student, CAPACITY)
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.way_out
