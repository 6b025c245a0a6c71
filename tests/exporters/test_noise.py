"""Noise floors: measured on the libraries' own modules, and turned into limits by a stated factor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from device_profiles import load_profile
from device_profiles.quantise import Quantise
from exporters import golden
from exporters.contents import FLOOR_FACTOR, tolerances
from exporters.families import capture_student
from exporters.families.image_vq import reference_decode
from exporters.noise import Floor, logit_noise, signal_noise
from exporters.student import load_student


def test_the_floor_of_a_decoder_is_its_reference_in_the_other_dtype(tiny_student: Path, tmp_path: Path) -> None:
    student = load_student(tiny_student)
    programs = {p.entry: p for p in capture_student(student, 128) if p.entry.startswith("image")}
    _, floors = golden.write_codec(student, "image", programs, tmp_path, {"image_decoder": ("bf16", "fp16")})
    found = {floor.precision: floor for floor in floors}
    assert set(found) == {"bf16", "fp16"}
    held = load_file(tmp_path / "image_decoder.safetensors")
    worst = math.inf
    for case in ("case0", "case1", "case2"):
        model = student.discretizer("image").half()
        with torch.no_grad():
            moved = reference_decode(model, torch.from_numpy(held[f"{case}.codes"])).double().numpy()
        expected = held[f"{case}.expected.image"].astype(float)
        worst = min(worst, 10 * math.log10((expected**2).sum() / ((moved - expected) ** 2).sum()))
    assert found["fp16"].metrics["snr"] == pytest.approx(worst, abs=0.01)
    assert found["fp16"].metrics["snr"] > found["bf16"].metrics["snr"] + 10  # three more bits of mantissa
    assert held["case0.signal"].shape == held["case0.expected.image"].shape


def test_the_floor_of_a_language_model(tiny_student: Path, tmp_path: Path) -> None:
    student = load_student(tiny_student)
    _, floors = golden.write_lm(student, None, 128, tmp_path / "lm.safetensors", ["fp16"])
    [floor] = floors
    assert (floor.component, floor.precision, floor.positions) == ("lm", "fp16", 8 * golden.STEPS)
    assert 0 < floor.metrics["mean_kl"] < 1e-3 and floor.metrics["p999_kl"] >= floor.metrics["mean_kl"]


def test_equal_outputs_have_no_noise() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    assert logit_noise(logits, logits, 0.0) == {"mean_kl": 0.0, "p999_kl": 0.0, "same_top": 1.0}
    wave = logits.reshape(1, 1, -1)
    assert signal_noise("audio", [(wave, wave)], 1.0) == {"snr": 200.0, "si_snr": 200.0}


def test_limits_are_a_multiple_of_the_floor_and_say_so() -> None:
    floors = [
        Floor("lm", "fp16", {"mean_kl": 1e-6, "p999_kl": 2e-5, "same_top": 0.998}, 500),
        Floor("image_decoder", "bf16", {"snr": 40.0, "psnr": 50.0, "ssim": 0.999}),
    ]
    rows = tolerances(load_profile("host"), ("lm", "image_decoder"), 1e-7, floors)
    limits = {(row["component"], row["gate"], row["metric"]): row for row in rows}
    assert limits["lm", "export-fp16", "mean_kl"]["limit"] == pytest.approx(FLOOR_FACTOR * 1e-6)
    assert limits["lm", "export-fp16", "same_top"]["limit"] == pytest.approx(
        1 - (math.sqrt(10) + 3 * math.sqrt(math.sqrt(10))) / 500
    )  # one flip in 500, its error tripled, and three standard deviations of that count
    assert limits["image_decoder", "export-bf16", "snr"]["limit"] == pytest.approx(30.0)  # ten times the noise power
    assert limits["image_decoder", "export-bf16", "ssim"]["limit"] == pytest.approx(0.99)
    assert "noise floor: the bf16 reference is at 40 " in limits["image_decoder", "export-bf16", "snr"]["source"]


def test_an_int8_cache_has_its_own_share_of_the_fast_modes_limits() -> None:
    plain = load_profile("host")
    cached = replace(plain, quantise=Quantise(kv_cache="int8", kv_cache_kl=0.004))
    before, after = (
        {(row["gate"], row["metric"]): row for row in tolerances(profile, ("lm",), 1e-7)} for profile in (plain, cached)
    )
    kl, same = ("export-fast", "mean_kl"), ("export-fast", "same_top")
    assert before[kl]["limit"] == plain.fast_kl and before[same]["limit"] == plain.fast_same_top
    assert after[kl]["limit"] == pytest.approx(plain.fast_kl + 0.004)
    flips = 1 - plain.fast_same_top
    assert 1 - after[same]["limit"] == pytest.approx(math.hypot(flips, flips))  # the cache's, as many as activations'
    assert all("kv_cache_kl" in after[key]["source"] and "kv_cache" not in before[key]["source"] for key in (kl, same))
    unchanged = before.keys() - {kl, same}
    assert {key: before[key] for key in unchanged} == {key: after[key] for key in unchanged}
