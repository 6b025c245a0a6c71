"""Sessions of TensorRT artifacts: an engine's positions, pieces and candidates, and the stand-in that runs the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle import Artifact, Bundle, load_bundle
from runtimes.errors import Fault
from runtimes.parity import check_compiled
from runtimes.session import KvOverflow, RuntimeInputError, limits_of, open_session
from runtimes.tensorrt_engine import EngineSession
from tests.runtimes.tensorrt_bundles import Array, OnnxEngine

LENGTH = 24


@pytest.fixture(scope="module")
def orin(orin_bundle: Path) -> Bundle:
    return load_bundle(orin_bundle)


@pytest.fixture(params=["fused", "typed"])
def lm(request: pytest.FixtureRequest, orin: Bundle) -> Artifact:
    return orin.artifact("lm", "tensorrt", request.param)


def ids(bundle: Bundle, length: int = LENGTH) -> Array:
    return np.random.default_rng(3).integers(0, bundle.vocab_size, (1, length)).astype(np.int32)


def engine_session(bundle: Bundle, artifact: Artifact, longest: int = 7) -> tuple[EngineSession, OnnxEngine]:
    engine = OnnxEngine(bundle, artifact, longest)
    return EngineSession(engine, artifact, limits_of(bundle, artifact)), engine


def whole(bundle: Bundle, artifact: Artifact) -> Array:
    with open_session(bundle, artifact) as session:
        assert session.stand_in is not None and "ONNX Runtime" in session.stand_in
        return np.array(session.run({"ids": ids(bundle)})["logits"])


@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (5, 1, 1, 17), (23, 1)])
def test_runs_in_pieces_equal_one_run(orin: Bundle, lm: Artifact, pieces: tuple[int, ...]) -> None:
    expected = whole(orin, lm)
    session, engine = engine_session(orin, lm)
    with session:
        for end, size in zip(np.cumsum(pieces), pieces, strict=True):
            got = session.run({"ids": ids(orin)[:, end - size : end]})["logits"]
    assert np.abs(got - expected).max() <= 4e-3 * np.abs(expected).max()  # float16, in another order of sums
    assert max(steps for _, steps, _ in engine.runs) <= 7
    assert [position for position, _, _ in engine.runs] == list(np.cumsum([0] + [s for _, s, _ in engine.runs])[:-1])


def test_outputs_are_asked_for_by_the_last_piece_alone(orin: Bundle, lm: Artifact) -> None:
    session, engine = engine_session(orin, lm)
    session.run({"ids": ids(orin)})
    assert [bool(wanted) for _, _, wanted in engine.runs] == [False, False, False, True]


def test_reset_begins_anew_over_what_is_left_in_the_cache(orin: Bundle, lm: Artifact) -> None:
    session, _ = engine_session(orin, lm)
    first = np.array(session.run({"ids": ids(orin, 9)})["logits"])
    session.run({"ids": ids(orin, 30)})
    session.reset()
    np.testing.assert_array_equal(session.run({"ids": ids(orin, 9)})["logits"], first)


def test_more_tokens_than_the_cache_holds_are_refused(orin: Bundle, lm: Artifact) -> None:
    session, engine = engine_session(orin, lm)
    with pytest.raises(KvOverflow):
        session.run({"ids": ids(orin, session.capacity + 1)})
    assert engine.runs == []


@pytest.mark.parametrize("span", [(0, 136), (72, 104), (104, 120), (135, 136), (3, 4)])
@pytest.mark.parametrize("stand_in", [False, True])
def test_candidates_are_the_largest_logits_of_the_range(orin: Bundle, span: tuple[int, int], stand_in: bool) -> None:
    artifact = orin.artifact("lm", "tensorrt", "fused")
    logits = whole(orin, artifact)[0]
    session = open_session(orin, artifact) if stand_in else engine_session(orin, artifact, longest=24)[0]
    first, end = span
    expected = first + np.argsort(-logits[first:end], kind="stable")[: session.candidates]
    with session:
        values, found = session.run_top({"ids": ids(orin)}, first, end)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(values, logits[expected])
        session.reset()  # the next plain run is over the whole vocabulary again
        np.testing.assert_array_equal(session.run({"ids": ids(orin)})["logits"][0], logits)


@pytest.mark.parametrize("span", [(5, 5), (-1, 3), (0, 137)])
def test_a_range_outside_the_vocabulary_is_refused(orin: Bundle, span: tuple[int, int]) -> None:
    session, _ = engine_session(orin, orin.artifact("lm", "tensorrt", "fused"))
    with pytest.raises(RuntimeInputError, match=r"rows .* of 136"):
        session.run_top({"ids": ids(orin)}, *span)


def test_a_model_without_such_a_head_says_so(orin: Bundle) -> None:
    session, _ = engine_session(orin, orin.artifact("lm", "tensorrt", "typed"))
    with pytest.raises(RuntimeInputError, match="no such head"):
        session.run_top({"ids": ids(orin)}, 0, 5)


def test_a_decoder_is_one_step(orin: Bundle) -> None:
    artifact = orin.artifact("image_decoder", "tensorrt", "fused")
    codes = np.arange(16, dtype=np.int32).reshape(1, 4, 4) % 16
    session, _ = engine_session(orin, artifact, longest=0)
    with open_session(orin, artifact) as file:
        np.testing.assert_array_equal(session.run({"codes": codes})["image"], file.run({"codes": codes})["image"])


def test_the_report_says_what_the_compiler_made(orin: Bundle) -> None:
    rows = {row.metric: row for row in check_compiled(orin.artifact("lm", "tensorrt", "typed"))}
    assert rows["layers"].status == "proxy" and "stands in for sm_87" in rows["layers"].where
    assert rows["fused/quantised product"].value is not None
    [parsed] = check_compiled(orin.artifact("lm", "tensorrt", "fused"))
    assert (parsed.metric, parsed.status) == ("parsed", "proxy")


@pytest.mark.parametrize("missing", ["compiler", "status", "capability", "patterns"])
def test_an_incomplete_account_of_the_compiler_is_a_fault(orin: Bundle, missing: str) -> None:
    typed = orin.artifact("lm", "tensorrt", "typed")
    compiled = {key: value for key, value in typed.options["compiled"].items() if key != missing}
    with pytest.raises(Fault, match="not what a build writes"):
        check_compiled(replace(typed, options={**typed.options, "compiled": compiled}))
