"""An int8 KV cache: its steps, its arithmetic in every ONNX form, and its own gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from device_profiles import load_profile
from device_profiles.quantise import Quantise
from exporters import ops
from exporters.backends import Job
from exporters.build import Request, build
from exporters.families.decoder_lm import build_reference, capture_lm
from exporters.kv_cache import MARGIN, cache_steps
from exporters.onnx_ import OnnxExporter
from exporters.plan import plan_entries, state_bytes
from exporters.quantise.calibration import load_calibration
from exporters.student import load_student
from runtimes.bundle import load_bundle
from tests.exporters.plain import one_form, text_only

CAPACITY, STEPS = 96, 20


@pytest.fixture(scope="module")
def held(tiny_student):
    student = load_student(tiny_student)
    return student, cache_steps(student, load_calibration(student, None), CAPACITY)


def test_steps_reach_what_calibration_does(held):
    """Against transformers' own cache, chain by chain and without padding: rows joined, as long as the cache."""
    student, steps = held
    model, joined = build_reference(student), torch.cat(load_calibration(student, None).rows)
    rows = [joined[at : at + CAPACITY] for at in range(0, len(joined), CAPACITY)]
    with torch.no_grad():
        caches = [model(row[None], use_cache=True).past_key_values for row in rows]
    for layer in range(student.config["num_hidden_layers"]):
        for kind, name in (("keys", "key"), ("values", "value")):
            largest = torch.stack([getattr(c.layers[layer], kind)[0].abs().amax(1) for c in caches]).amax(0)
            assert np.allclose(steps[f"{name}_{layer}"][:, 0] * 127 / MARGIN, largest.numpy(), rtol=1e-4)


def test_codes_are_rounded_half_to_even_and_clamped():
    """The op's own reference against numpy: what is written, and what attention then reads."""
    rng = np.random.default_rng(0)
    heads, width, capacity = 2, 8, 6
    key, value, query = (torch.from_numpy(rng.standard_normal((1, 3, heads * width)).astype("f")) for _ in range(3))
    step = torch.full((heads, 1, width), 0.011)
    past = torch.zeros(1, heads, capacity, width, dtype=torch.int8)
    last = torch.tensor([2], dtype=torch.int32)
    given = (query, key, value, past, past, last, None, None, heads, heads, 0.3, 0, 0.0, step, step)
    out, keys, values = ops.kv_attention.reference(*given)
    rows = key.reshape(3, heads, width).transpose(0, 1).double().numpy() / np.float32(0.011)
    expected = np.clip(np.round(rows), -128, 127)
    assert keys.dtype == torch.int8
    assert np.abs(keys[0, :, :3].numpy() - expected).max() <= (np.abs(rows % 1 - 0.5).min() < 1e-4)
    assert (np.abs(expected) >= 127).any()
    # What attention computes is float attention over the values that the codes stand for.
    read = [(codes.float() * step)[:, :, :3].transpose(1, 2).flatten(2) for codes in (keys, values)]
    plain = torch.zeros(1, heads, capacity, width)
    wanted = ops.kv_attention.reference(query, *read, plain, plain, *given[5:13])[0]
    assert torch.allclose(out, wanted, atol=1e-6)


def test_both_forms_run_the_reference_arithmetic_in_chunks_and_steps(held, tmp_path):
    student, steps = held
    program = capture_lm(student, CAPACITY, steps)
    kinds = [("fused", "exact"), ("standard", "exact")]
    artifacts = OnnxExporter().export(Job(program, load_profile("host"), tmp_path, kinds))
    assert [a.operators.get("GroupQueryAttention", 0) for a in artifacts] == [2, 0]
    ids = load_calibration(student, None).rows[0][:STEPS].numpy().astype(np.int32)[None]
    cuts = [(0, 7), (7, 12), *((i, i + 1) for i in range(12, STEPS))]
    found, codes = [], []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else it rounds activations
    for artifact in artifacts:
        session = onnxruntime.InferenceSession(tmp_path / artifact.model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        states = {state.input: np.zeros(state.shape, state.dtype) for state in artifact.states}
        logits = []
        for start, stop in cuts:
            feeds = {"ids": ids[:, start:stop], "last": np.array([stop - 1], np.int32)}
            results = dict(zip(names, session.run(None, feeds | states), strict=True))
            states = {state.input: results[state.output] for state in artifact.states}
            logits.append(results["logits"][0])
        found.append(np.stack(logits))
        codes.append(states)
    assert np.abs(found[0] - found[1]).max() < 1e-2 * np.abs(found[1]).max()
    for name, values in codes[0].items():
        assert values.dtype == np.int8
        # A float32 rounding apart, a value may fall to either side of a tie.
        assert np.abs(values.astype(int) - codes[1][name]).max() <= 1
    with torch.no_grad():
        expected = build_reference(student)(torch.from_numpy(ids).long(), use_cache=False).logits[0].numpy()
    expected = expected[[stop - 1 for _, stop in cuts]]
    for logits in found:
        assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_an_int8_cache_takes_a_quarter_and_others_are_left_out_by_name(held):
    student, steps = held
    program, plain = capture_lm(student, CAPACITY, steps), capture_lm(student, CAPACITY)
    assert 4 * sum(state_bytes(program)) == sum(state_bytes(plain))
    entries = plan_entries(load_profile("host"), program, None)
    assert {entry.backend for entry in entries if not entry.left_out} == {"onnx"}
    for entry in entries:
        assert not entry.left_out or "int8 KV cache" in entry.left_out, entry


def test_the_gate_of_the_cache_has_the_limit_of_the_profile(tiny_student, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.safetensors").write_bytes((Path(tiny_student) / "samples" / "lm.safetensors").read_bytes())
    settings = Quantise(kv_cache="int8", kv_cache_kl=0.02)
    package = text_only(tiny_student, tmp_path / "student")
    request = Request(
        one_form(quantise=settings), package, None, tmp_path / "out", context=CAPACITY, bench=False, calibration=data
    )
    bundle, report, _ = build(replace(request, allow_failed=True))
    assert {state.dtype for state in load_bundle(bundle.folder).artifact("lm").states} == {"int8"}
    [row] = [r for r in report.results if (r.gate, r.metric) == ("export-int8-cache", "mean_kl")]
    assert row.limit == 0.02
    assert "kv_cache_kl" in row.limit_source
    assert row.value > 0
    assert row.status == ("passed" if row.value <= 0.02 else "failed")
    assert not [r for r in report.results if r.gate == "export"]
