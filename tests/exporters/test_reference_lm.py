"""The streamed reference: bit for bit what the whole model computes, holding no weight between its modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporters.families import reference_lm
from exporters.families.decoder_lm import build_reference
from exporters.families.reference_lm import streamed_reference
from exporters.student import Student, load_student
from tests.conftest import MakeStudent
from tools.random_student import write_student

IDS = torch.tensor([[5, 900, 5, 17, 0, 1002, 3]])


@pytest.fixture(scope="module", params=["float16", "packed", "packed-head"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    options = {
        "float16": dict(bits=None, tied=False),
        "packed": dict(bits=4),
        "packed-head": dict(bits=4, quantise_embedding=8, dtype="bfloat16"),
    }[request.param]
    return load_student(write_student(tmp_path_factory.mktemp("student"), "tiny", **options))


@torch.no_grad()
def logits(model: PreTrainedModel, **options) -> Tensor:
    return model(IDS, use_cache=False, **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_whole_model_bit_for_bit(student: Student, dtype: torch.dtype) -> None:
    expected = logits(build_reference(student, dtype))
    model = streamed_reference(student, dtype)
    first, again = logits(model), logits(model)
    assert first.dtype == dtype and torch.equal(first, expected) and torch.equal(again, expected)
    kept = logits(model, logits_to_keep=torch.tensor([2, 5]))
    assert torch.allclose(kept, expected[:, [2, 5]], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_nothing_is_held_between_calls(student: Student) -> None:
    model = streamed_reference(student)
    logits(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # what is built elsewhere is as it always was


def test_a_head_in_slices(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits(streamed_reference(student))
    monkeypatch.setattr(reference_lm, "HEAD_ROWS", 100)  # the last slice is a short one
    torch.testing.assert_close(logits(streamed_reference(student)), whole, rtol=1e-6, atol=1e-6)


def test_other_families(make_tiny_student: MakeStudent) -> None:
    for kind in ("llama", "qwen3"):
        student = load_student(make_tiny_student(model_type=kind))
        with torch.no_grad():
            ids = torch.arange(9)[None]
            assert torch.equal(streamed_reference(student)(ids).logits, build_reference(student)(ids).logits)


def test_a_student_that_is_written_twice_is_the_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        (write_student(tmp_path / name, "tiny", seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == two != other
