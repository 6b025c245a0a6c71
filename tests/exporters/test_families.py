"""Families of language models against transformers' own eager forward and generate: random weights, several shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import inheritance
from exporters.backends import load_exporter
from exporters.families.decoder_lm import build_reference, capture_lm
from exporters.student import load_student
from tests.exporters.families_maker import (
    CASES,
    CHUNKS,
    SINGLE,
    Case,
    expected,
    opened,
    quantise,
    relative,
    steps,
    tokens,
    write,
)
from tools.family_matrix import CAPACITY, run_program, tiny_config

LIMIT = 1e-5
#: The cases whose artifacts are made in the usual run, and the backends and forms that every case is made for.
USUAL = ("gemma3-scaled", "phi3-partial", "qwen3_moe")
#: Cases of the captured Program that the usual run leaves out: what they have, others have too.
SELDOM = {
    "llama",
    "llama-linear",
    "llama-yarn",
    "qwen2",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "phi",
    "mixtral",
    "qwen2_moe",
    "gpt_bigcode-all-heads",
    "biogpt",
    "falcon-all-heads",
    "gptj",
}
FORMS = [("onnx", "fused", "exact"), ("onnx", "standard", "exact"), ("openvino", "ir", "exact")]
OTHERS = [("tvm", "compiled", "exact"), ("coreml", "mlprogram", "exact"), ("tensorrt", "typed", "exact")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in SELDOM else []) for name in CASES]
)
def test_the_captured_program_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """In chunks, and in single steps past the window."""
    model = write(CASES[name], tmp_path)
    program, ids = capture_lm(load_student(tmp_path), CAPACITY), tokens(sum(CHUNKS))
    for chunks in (CHUNKS, SINGLE):
        wanted = expected(model, ids, chunks)
        assert np.abs(wanted).max() > 0.5
        assert relative(run_program(program, ids, chunks), wanted) <= LIMIT


#: Cases whose artifacts are not made: there is another case of the family.
ALIKE = {"llama-linear", "llama-yarn", "gpt2-scaled-by-layer", "gpt_bigcode-all-heads", "opt-projected", "gemma3",
         "falcon-groups", "falcon-all-heads", "qwen2", "phi3-longrope-short"}  # fmt: skip


def _cases(backends: list[tuple[str, str, str]], usual: bool) -> list[Any]:
    return [
        pytest.param(
            name,
            *backend,
            marks=() if usual and name in USUAL else pytest.mark.long,
            id=f"{name}-{backend[0]}-{backend[1]}",
        )
        for name in CASES
        if name not in ALIKE
        for backend in backends
    ]


@pytest.mark.parametrize(("name", "backend", "form", "mode"), _cases(FORMS, usual=True) + _cases(OTHERS, usual=False))
def test_every_backend_computes_what_transformers_computes(
    name: str, backend: str, form: str, mode: str, tmp_path: Path
) -> None:
    model = write(CASES[name], tmp_path / "checkpoint")
    program, ids = capture_lm(load_student(tmp_path / "checkpoint"), CAPACITY), tokens(sum(CHUNKS))
    (tmp_path / "out").mkdir()
    with opened(program, backend, (form, mode), tmp_path / "out") as session:
        for chunks in (CHUNKS, SINGLE):
            assert relative(steps(session, ids, chunks), expected(model, ids, chunks)) <= LIMIT
        if (backend, form) == ("onnx", "fused"):
            operators = session.artifact.operators
            assert {op: operators.get(op, 0) for op in CASES[name].operators} == CASES[name].operators


#: RoPE in the old spelling -> the same in the new one.
SPELLINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", dict(rope_theta=100.0), dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "scaling": (
        "llama",
        dict(rope_theta=100.0, rope_scaling=dict(type="linear", factor=4.0)),
        dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0)),
    ),
    "two tables": (
        "gemma3_text",
        dict(rope_theta=1000.0, rope_local_base_freq=100.0, rope_scaling=dict(rope_type="linear", factor=8.0)),
        dict(rope_parameters=CASES["gemma3-scaled"].options["rope_parameters"]),
    ),
    "partial": (
        "phi3",
        dict(rope_theta=100.0, partial_rotary_factor=0.5),
        dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)),
    ),
}
ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def respell(folder: Path, spelling: dict[str, Any]) -> None:
    """Replaces all that config.json says about RoPE."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ROPE_KEYS}
    path.write_text(json.dumps(config | spelling))


@pytest.mark.parametrize("name", SPELLINGS)
def test_both_spellings_of_rope_are_one_model(name: str, tmp_path: Path) -> None:
    """The same numbers; and leaving the spelling out gives others, so a reader of one alone would be noticed."""
    kind, old, new = SPELLINGS[name]
    layers = dict(layer_types=["sliding_attention", "full_attention", "full_attention"])
    write(Case(kind, layers if kind == "gemma3_text" else {}), tmp_path)
    found = []
    for spelling in (old, new, {}):
        respell(tmp_path, spelling)
        program = capture_lm(load_student(tmp_path), CAPACITY)
        tables = {name: c.load() for name, c in program.constants.items() if "rotary_emb" in name}
        found.append(tables)
    assert found[0].keys() == found[1].keys() and len(found[0]) == (4 if kind == "gemma3_text" else 2)
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
    assert any(
        found[0][key].shape != found[2][key].shape or not np.array_equal(found[0][key], found[2][key])
        for key in found[0]
    )


@pytest.mark.parametrize(
    "name", ["gemma2-small-caps", pytest.param("phi3-partial", marks=pytest.mark.long), "mixtral", "gpt2"]
)
def test_greedy_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    """Token by token through our session, as long as the library's own two best logits are apart."""
    model = write(CASES[name], tmp_path / "checkpoint")
    prompt = tokens(12)
    out = model.generate(
        torch.from_numpy(prompt).long(), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    wanted = out.sequences[0, 12:].tolist()
    best = torch.stack(out.logits)[:, 0].topk(2).values
    assert (best[:, 0] - best[:, 1] > 1e-4).all()
    program = capture_lm(load_student(tmp_path / "checkpoint"), CAPACITY)
    (tmp_path / "out").mkdir()
    with opened(program, "onnx", ("fused", "exact"), tmp_path / "out") as session:
        logits, got = session.run({"ids": prompt})["logits"][0], []
        for _ in wanted:
            got.append(int(np.argmax(logits)))
            logits = session.run({"ids": np.array([[got[-1]]], np.int32)})["logits"][0]
    assert got == wanted


QUANTISED = ["gemma2", "phi3-partial", "qwen3_moe", "qwen2_moe", "mixtral"]
#: Sizes that groups of 16 divide; 48 is no power of two, and the experts are narrower than the layer.
DIVISIBLE = dict(hidden_size=48, intermediate_size=80, moe_intermediate_size=32)


@pytest.mark.parametrize(
    ("name", "backend", "form"),
    [
        pytest.param(name, backend, form, marks=[] if (name, form) == ("qwen3_moe", "fused") else pytest.mark.long)
        for name in QUANTISED
        for backend, form in (("onnx", "fused"), ("onnx", "standard"), ("openvino", "ir"))
    ],
)
def test_four_bit_checkpoints_compute_with_their_own_codes(name: str, backend: str, form: str, tmp_path: Path) -> None:
    """Projections and every expert's matrices in 4 bits, against the library's model with the dequantised weights."""
    folder = tmp_path / "checkpoint"
    case = CASES[name]
    config = tiny_config(case.model_type)
    sizes = {key: value for key, value in DIVISIBLE.items() if hasattr(config, key)}
    write(Case(case.model_type, case.options | sizes), folder)
    quantise(folder)
    student = load_student(folder)
    experts = [module for module in student.quantized if ".experts." in module]
    moe = "moe" in name or name == "mixtral"
    assert len(experts) == (36 if moe else 0)
    model = build_reference(student)
    program, ids = capture_lm(student, CAPACITY), tokens(sum(CHUNKS))
    assert {source for matrix in program.inherited.values() for source in matrix.sources} == set(student.quantized)
    (tmp_path / "out").mkdir()
    with opened(program, backend, (form, "exact"), tmp_path / "out") as session:
        for chunks in (CHUNKS, SINGLE):
            assert relative(steps(session, ids, chunks), expected(model, ids, chunks)) <= LIMIT
        artifact = session.artifact
    stored = load_exporter(backend).read_matrices(tmp_path / "out", artifact, program)
    found = inheritance.compare(artifact.label, program, stored, student.quantized)
    assert found.identical == found.total > 3 * len(experts) and not found.mismatches
    assert artifact.operators.get("QMoE", 0) == (3 if moe and (backend, form) == ("onnx", "fused") else 0)
