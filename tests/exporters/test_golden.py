"""Golden files: what they hold is what the libraries' own models say, and it is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, DacModel

from exporters import golden
from exporters.families.references import REFERENCES
from exporters.student import load_student
from runtimes.bundle import load_bundle
from runtimes.golden import load_cases, load_lm
from tests.conftest import MakeStudent
from tests.exporters.plain import CONTEXT, write_plain

CAPACITY = 128


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain") / "llama")


def test_rows_are_the_logits_after_each_prefix(plain: Path, tmp_path: Path) -> None:
    noise, _ = golden.write_lm(load_student(plain), None, CONTEXT, tmp_path / "lm.safetensors")
    held = load_file(tmp_path / "lm.safetensors")
    assert set(held) == {"ids", "prompt", "logits"}
    assert held["ids"].dtype == held["prompt"].dtype == np.int32 and held["logits"].dtype == np.float32
    assert held["logits"].shape == (len(held["ids"]), golden.STEPS, 67)
    assert len(set(held["prompt"].tolist())) >= 2
    assert held["ids"].shape[1] >= held["prompt"].max() + golden.STEPS
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for sample, step in ((0, 0), (0, golden.STEPS - 1), (len(held["ids"]) - 1, 17)):
        fed = held["ids"][sample, : held["prompt"][sample] + step]
        with torch.no_grad():
            logits = model(torch.from_numpy(fed)[None].long()).logits[0, -1].numpy()
        np.testing.assert_allclose(held["logits"][sample, step], logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    assert 1e-9 < noise < 1e-5  # float32 against float64


def test_the_float_twin_gives_the_loss_gate_its_reference(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    floating = make_tiny_student(variant="float")
    golden.write_lm(load_student(make_tiny_student()), load_student(floating), CAPACITY, tmp_path / "lm.safetensors")
    held = load_file(tmp_path / "lm.safetensors")
    model = AutoModelForCausalLM.from_pretrained(floating, dtype=torch.float32).eval()
    fed = held["ids"][1, : held["prompt"][1] + 5]
    with torch.no_grad():
        logits = model(torch.from_numpy(fed)[None].long()).logits[0, -1].numpy()
    np.testing.assert_allclose(held["float_logits"][1, 5], logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    assert np.abs(held["float_logits"] - held["logits"]).max() > 0.1  # 4 bits do lose something


def test_the_packages_own_samples_are_used(tiny_student: Path) -> None:
    student = load_student(tiny_student)
    ids, prompts = golden.lm_samples(student, CAPACITY)
    samples = load_file(tiny_student / "samples" / "lm.safetensors")
    first = samples["ids"][0, : samples["length"][0]]
    np.testing.assert_array_equal(ids[0, : len(first)], first)
    second = samples["ids"][1, : samples["length"][1]]  # where one ends the next goes on
    np.testing.assert_array_equal(ids[0, len(first) : len(first) + len(second)][: ids.shape[1] - len(first)], second)
    assert ids.shape == (len(prompts), prompts.max() + golden.STEPS)


def test_without_samples_they_are_seeded_and_short_of_the_capacity(plain: Path) -> None:
    student = load_student(plain)
    ids, prompts = golden.lm_samples(student, golden.STEPS + golden.LONGEST_PROMPT)
    again, _ = golden.lm_samples(student, golden.STEPS + golden.LONGEST_PROMPT)
    np.testing.assert_array_equal(ids, again)
    assert ids.shape[1] == golden.STEPS + golden.LONGEST_PROMPT
    assert (ids >= 0).all() and (ids < 67).all() and len(np.unique(ids)) > 30
    assert prompts.min() >= 1 and prompts.max() <= golden.LONGEST_PROMPT


def test_writing_twice_gives_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    student = load_student(plain)
    for name in ("a", "b"):
        golden.write_lm(student, None, CONTEXT, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_large_vocabulary_has_fewer_samples(tmp_path: Path) -> None:
    student = load_student(write_plain(tmp_path, vocab_size=20_001))
    ids, prompts = golden.lm_samples(student, CONTEXT)
    assert len(ids) == len(prompts) == golden.LARGEST_LOGITS // (4 * golden.STEPS * 20_001) == 3


def test_the_bundles_golden_files_can_be_read_by_the_runtime(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert set(bundle.golden) == {"lm", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder"}
    assert load_lm(bundle).float_logits is not None


def decoded(model: VQModel | DacModel, codes: torch.Tensor) -> torch.Tensor:
    """The published way from codes to the signal, written out once more."""
    if isinstance(model, DacModel):
        latents = model.quantizer.from_codes(codes)[0]
        return model.decoder(latents)
    entries = model.quantize.embedding(codes).permute(0, 3, 1, 2)
    return model.decoder(model.post_quant_conv(entries))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_codec_cases_are_the_librarys_own_results(modality: str, tiny_student: Path, tiny_bundle: Path) -> None:
    student, bundle = load_student(tiny_student), load_bundle(tiny_bundle)
    model = student.discretizer(modality)
    entry = student.modalities[modality]
    decoding = load_cases(bundle, bundle.artifact(f"{modality}_decoder"))
    encoding = load_cases(bundle, bundle.artifact(f"{modality}_encoder"))
    shapes = [case.feeds["codes"].shape for case in decoding]
    scales = REFERENCES[type(model).__name__].scales
    assert len(shapes) == len(scales) == len(set(shapes))
    assert len({case.feeds[modality].shape for case in encoding}) == len(scales)
    for case in decoding:
        codes = torch.from_numpy(case.feeds["codes"]).long()
        assert codes.min() >= 0 and codes.max() < entry.codebook_size and len(codes.unique()) > 1
        with torch.no_grad():
            signal = decoded(model, codes).numpy()
        got = case.expected[modality]
        np.testing.assert_allclose(got.reshape(signal.shape), signal, atol=1e-5 * np.abs(signal).max())
        assert got.std() > 0
    for source, target in zip(encoding, decoding, strict=True):  # the decoder's codes are those of real signals
        np.testing.assert_array_equal(source.expected["codes"], target.feeds["codes"])
