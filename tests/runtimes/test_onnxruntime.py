"""ONNX Runtime's session: prompts that are run in chunks, against eager transformers and against single steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch

from exporters.student import load_student
from runtimes import onnxruntime_
from runtimes.onnxruntime_ import OnnxRuntimeSession
from runtimes.session import KvOverflow, Limits
from tests.exporters.test_decoder_lm import CAPACITY, FAMILIES, VOCAB, export, write_checkpoint

CHUNK = 8
IDS = np.random.default_rng(5).integers(0, VOCAB, (1, CAPACITY)).astype(np.int32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxRuntimeSession, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("chunks")
    model = write_checkpoint(folder / "checkpoint", *FAMILIES["llama"])
    artifact = export(load_student(folder / "checkpoint"), folder)["fused"]
    vendor = onnxruntime.InferenceSession(folder / artifact.model, providers=["CPUExecutionProvider"])
    return OnnxRuntimeSession(vendor, artifact, Limits(CAPACITY, {"ids": VOCAB}), timing=True), model


@pytest.fixture
def session(
    made: tuple[OnnxRuntimeSession, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> Iterator[OnnxRuntimeSession]:
    monkeypatch.setattr(onnxruntime_, "_CHUNK", CHUNK)
    made[0].reset()
    yield made[0]


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, CAPACITY])
def test_a_prompt_longer_than_a_chunk_gives_the_logits_of_the_whole(
    length: int, session: OnnxRuntimeSession, made: tuple[OnnxRuntimeSession, torch.nn.Module]
) -> None:
    ids = IDS[:, :length]
    with torch.no_grad():
        expected = made[1](torch.from_numpy(ids).long(), use_cache=False).logits[0, -1].numpy()
    logits = session.run({"ids": ids})["logits"][0]
    assert session.position == length and session.last_run_seconds > 0
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_chunks_go_on_where_the_cache_ends(session: OnnxRuntimeSession) -> None:
    for token in IDS[0, :23]:
        single = session.run({"ids": token.reshape(1, 1)})["logits"]
    expected = single.copy()
    session.reset()
    session.run({"ids": IDS[:, :3]})
    np.testing.assert_allclose(session.run({"ids": IDS[:, 3:23]})["logits"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(KvOverflow):
        session.run({"ids": IDS[:, : CAPACITY - 22]})
    assert session.position == 23


def test_no_call_of_the_graph_is_longer_than_a_chunk(
    session: OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    append = OnnxRuntimeSession._append

    def counted(self: OnnxRuntimeSession, ids: np.ndarray, end: int) -> dict[str, np.ndarray]:
        calls.append((ids.shape[1], end))
        return append(self, ids, end)

    monkeypatch.setattr(OnnxRuntimeSession, "_append", counted)
    session.run({"ids": IDS[:, :17]})
    assert calls == [(6, 6), (6, 12), (5, 17)]  # as equal as they can be: a short rest would cost as much as a chunk
