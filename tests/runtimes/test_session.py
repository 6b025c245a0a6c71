"""Sessions: the cache against a full forward pass, positions, reset, the table of backends, and what a step costs."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtimes.bundle import Bundle, BundleError, load_bundle, staged, write_manifest
from runtimes.session import BackendUnavailable, KvOverflow, RuntimeInputError, choose_artifact, open_session
from runtimes.torch_ import TorchSession
from tests.bundle_maker import make_bundle, manifest
from tests.runtimes.eager_lm import CAPACITY, VOCAB, WIDTH, EagerLm, lm_artifact, open_eager_decoder, open_eager_lm

IDS = np.random.default_rng(3).integers(0, VOCAB, (1, 20)).astype(np.int32)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 5, 6]])
def test_any_chunking_gives_the_logits_of_one_pass(in_place: bool, chunks: list[int]) -> None:
    with torch.inference_mode():
        states = torch.zeros(2, CAPACITY, WIDTH)
        expected = EagerLm(True)(torch.from_numpy(IDS), torch.tensor([19]), *states)[0].numpy()
    with open_eager_lm(in_place) as session:
        for end, length in zip(np.cumsum(chunks), chunks, strict=True):
            logits = session.run({"ids": IDS[:, end - length : end]})["logits"]
            assert session.position == end
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_reset_forgets() -> None:
    with open_eager_lm() as session:
        first = session.run({"ids": IDS[:, :4]})["logits"].copy()
        session.run({"ids": IDS[:, 4:9]})
        session.reset()
        assert session.position == 0
        np.testing.assert_array_equal(session.run({"ids": IDS[:, :4]})["logits"], first)


def test_the_cache_fills_to_its_last_slot_and_a_refused_step_leaves_it_as_it_was() -> None:
    with open_eager_lm() as session:
        session.run({"ids": np.zeros((1, CAPACITY - 1), np.int32)})
        with pytest.raises(KvOverflow):
            session.run({"ids": np.zeros((1, 2), np.int32)})
        with pytest.raises(RuntimeInputError):
            session.run({"ids": np.array([[VOCAB]], np.int32)})
        assert session.position == CAPACITY - 1
        session.run({"ids": np.zeros((1, 1), np.int32)})
        with pytest.raises(KvOverflow, match="Call reset"):
            session.run({"ids": np.zeros((1, 1), np.int32)})


def test_the_order_of_memory_is_no_matter() -> None:
    codes = np.arange(32, dtype=np.int32).reshape(2, 4, 4) % 16
    with open_eager_decoder() as session:
        expected = session.run({"codes": codes})["image"].copy()
        for same in (np.asfortranarray(codes), np.ascontiguousarray(codes[::-1])[::-1]):
            assert not same.flags.c_contiguous
            np.testing.assert_array_equal(session.run({"codes": same})["image"], expected)


def test_the_runtimes_own_time_is_kept_when_asked_for() -> None:
    with open_eager_lm(timing=True) as session:
        session.run({"ids": IDS})
        assert 0 < session.last_run_seconds < 10


def test_a_step_leaves_no_memory_behind() -> None:
    with open_eager_lm() as session:
        feeds = {"ids": IDS[:, :1]}
        for _ in range(3):
            session.run(feeds)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(25):
                session.run(feeds)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 2000


def torch_bundle(folder: Path) -> Bundle:
    """A bundle whose language model is a saved torch program."""
    dynamic = {"ids": {1: torch.export.Dim.DYNAMIC}, "last": None, "key": None, "value": None}
    example = (
        torch.zeros(1, 3, dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        *torch.zeros(2, CAPACITY, WIDTH),
    )
    program = torch.export.export(EagerLm(False), example, dynamic_shapes=dynamic)
    artifact = lm_artifact()
    fields = manifest(
        vocab_size=VOCAB,
        context=CAPACITY,
        modalities={"text": {"tokens": [0, VOCAB]}},
        special={"bos": None, "eos": [], "pad": None},
        golden={},
        artifacts=[
            {
                **{name: getattr(artifact, name) for name in ("component", "backend", "form", "mode", "model")},
                "files": list(artifact.files),
                "inputs": [vars(spec) | {"shape": list(spec.shape)} for spec in artifact.inputs],
                "outputs": [vars(spec) | {"shape": list(spec.shape)} for spec in artifact.outputs],
                "states": [vars(spec) | {"shape": list(spec.shape)} for spec in artifact.states],
                "precision": dict(artifact.precision),
                "bytes_per_token": None,
                "operators": {},
                "preferred": True,
            }
        ],
    )
    with staged(folder) as stage:
        torch.export.save(program, stage / "lm.pt2")
        write_manifest(stage, fields)
    return load_bundle(folder)


def test_a_saved_torch_program_opens_from_a_bundle(tmp_path: Path) -> None:
    bundle = torch_bundle(tmp_path / "bundle")
    artifact = choose_artifact(bundle, "lm")
    with open_session(bundle, artifact, threads=1) as session, open_eager_lm() as eager:
        assert isinstance(session, TorchSession)
        assert (session.capacity, session.position) == (CAPACITY, 0)
        for part in (IDS[:, :6], IDS[:, 6:7], IDS[:, 7:8]):
            expected = eager.run({"ids": part})["logits"]
            np.testing.assert_allclose(session.run({"ids": part})["logits"], expected, atol=1e-5)


def test_an_unknown_backend_is_refused_by_name(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    artifact = replace(bundle.artifacts[0], backend="abacus")
    with pytest.raises(BackendUnavailable, match=r"'abacus'.*Known: coreml, onnx, openvino, tensorrt, torch, tvm"):
        open_session(bundle, artifact)


def test_choosing_an_artifact(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    exact = bundle.artifacts[0]
    fast = replace(exact, mode="fast", preferred=False)
    image = replace(exact, component="image_decoder")
    bundle = replace(bundle, artifacts=(fast, exact, image))
    assert choose_artifact(bundle, "lm") is exact
    assert choose_artifact(bundle, "lm", mode="fast") is fast
    assert choose_artifact(bundle, "image_decoder", mode="fast") is image
    for wrong in ({"backend": "tvm"}, {"form": "standard"}):
        with pytest.raises(BundleError, match="bundle holds"):
            choose_artifact(bundle, "lm", **wrong)
