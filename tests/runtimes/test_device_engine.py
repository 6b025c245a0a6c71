"""What an engine's session does with its device: where caches lie, what is copied when, what is recorded."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from exporters.backends import Kind
from runtimes.bundle import Bundle
from runtimes.device_engine import DeviceEngine
from runtimes.session import KvOverflow, OutOfDeviceMemory, SessionClosed, limits_of, open_session
from runtimes.tensorrt_engine import EngineSession
from tests.runtimes.engine_maker import (
    CAPACITY,
    LONGEST,
    VOCAB,
    WIDTHS,
    Array,
    HostDevice,
    K,
    OnnxPlan,
    counting_model,
    engine_session,
    expected,
    tiny_engine_bundle,
)
from tests.tensorrt_maker import FUSED, JETSON, TYPED, exported


@pytest.fixture(scope="module", params=["aliased", "delta"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_engine_bundle(tmp_path_factory.mktemp("engine") / "bundle", request.param)


def tokens(length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, VOCAB, (1, length)).astype(np.int32)


def feed(session: EngineSession, ids: Array) -> Array:
    return session.run({"ids": ids})["logits"]


@pytest.mark.parametrize(
    "pieces",
    [(16,), (1,) * 16, (5, 5, 5, 1), (6, 1, 9), (1, 15), (LONGEST,), (LONGEST + 1,), (1, 1, 4, 1, 1)],
    ids=str,
)
def test_any_pieces_give_the_whole(bundle: Bundle, pieces: tuple[int, ...]) -> None:
    ids = tokens(sum(pieces))
    with engine_session(bundle)[0] as session:
        for end, size in zip(np.cumsum(pieces), pieces, strict=True):
            np.testing.assert_array_equal(feed(session, ids[:, end - size : end]), expected(ids[:, :end]))
        assert session.position == sum(pieces)


def test_a_reset_forgets_everything(bundle: Bundle) -> None:
    with engine_session(bundle)[0] as session:
        for seed, lengths in enumerate([(9, 1, 1), (1, 3), (2, 1, 1, 1)]):
            session.reset()
            ids = tokens(sum(lengths), seed)
            for end, size in zip(np.cumsum(lengths), lengths, strict=True):
                got = feed(session, ids[:, end - size : end])
            np.testing.assert_array_equal(got, expected(ids))


def test_a_run_is_cut_at_the_longest_and_only_its_end_is_read(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle)
    device.calls.clear()
    feed(session, tokens(2 * LONGEST + 2))
    counts = Counter(device.calls)
    assert (counts["enqueue"], counts["to_host"]) == (3, 1)


def test_a_decode_step_is_one_launch_and_allocates_nothing(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle)
    feed(session, tokens(3))
    feed(session, tokens(1))  # runs plainly, then is recorded
    for _ in range(5):
        device.calls.clear()
        feed(session, tokens(1))
        counts = Counter(device.calls)
        copies = len(WIDTHS) if "new_key" in session.artifact.states[0].output else 0
        assert counts == Counter(
            {"enter": 1, "to_device": 3, "launch": 1, "to_host": 1, **({"copy_rows": copies} if copies else {})}
        )


def test_an_engine_that_cannot_be_recorded_runs_plainly(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle, capturable=False)
    ids = tokens(4)
    for end in range(4):
        got = feed(session, ids[:, end : end + 1])
    np.testing.assert_array_equal(got, expected(ids))
    assert Counter(device.calls)["enqueue"] == 4 and "launch" not in device.calls


def test_a_cache_is_one_buffer_for_both_ranges(bundle: Bundle) -> None:
    session, device, plan = engine_session(bundle)
    assert plan.bound[0] == plan.bound[1] and set(plan.bound[0].values()) == set(device.blocks)
    for state in session.artifact.states:
        shared = plan.bound[0][state.input] == plan.bound[0][state.output]
        assert shared == (session.artifact.options["states"] == "aliased")


def test_more_than_the_cache_holds_never_reaches_the_device(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle)
    feed(session, tokens(CAPACITY - 1))
    device.calls.clear()
    with pytest.raises(KvOverflow):
        feed(session, tokens(2))
    assert device.calls == []
    feed(session, tokens(1))  # the last slot
    session.close()  # looks at the guards around each buffer


@pytest.mark.parametrize(("first", "end"), [(0, VOCAB), (2, 9), (4, 6), (VOCAB - 1, VOCAB)])
def test_candidates_of_a_range(bundle: Bundle, first: int, end: int) -> None:
    ids = tokens(8)
    session, device, _ = engine_session(bundle)
    device.calls.clear()
    values, best = session.run_top({"ids": ids}, first, end)
    logits = expected(ids)[0]
    wanted = first + np.argsort(-logits[first:end], kind="stable")[:K]
    np.testing.assert_array_equal(best, wanted)
    np.testing.assert_array_equal(values, logits[wanted])
    assert Counter(device.calls)["to_host"] == 2  # the logits stay there
    more = tokens(1, 7)
    np.testing.assert_array_equal(feed(session, more), expected(np.concatenate([ids, more], 1)))


def test_an_engine_may_have_made_int64_of_the_ids(bundle: Bundle, tmp_path: Path) -> None:
    artifact = bundle.artifact("lm")
    model = counting_model(str(artifact.options["states"]), head=True, ids_type=TensorProto.INT64)
    device = HostDevice()
    plan = _plan_of(model.SerializeToString(), bundle, device, tmp_path)
    session = EngineSession(DeviceEngine(plan, device, artifact), artifact, limits_of(bundle, artifact))
    ids = tokens(7)
    np.testing.assert_array_equal(feed(session, ids), expected(ids))


def _plan_of(model: bytes, bundle: Bundle, device: HostDevice, folder: Path) -> OnnxPlan:
    from dataclasses import replace

    (folder / bundle.artifact("lm").model).parent.mkdir()
    (folder / bundle.artifact("lm").model).write_bytes(model)
    return OnnxPlan(replace(bundle, folder=folder), bundle.artifact("lm"), device)


def test_sizes_of_a_decoder_follow_its_input(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle, "audio_decoder")
    for shape in ((1, 4), (2, 9), (1, 1)):
        codes = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        np.testing.assert_array_equal(session.run({"codes": codes})["audio"], 2.0 * codes[:, None])
    strided = np.arange(16, dtype=np.int32).reshape(2, 8)[:, ::2]
    np.testing.assert_array_equal(session.run({"codes": strided})["audio"], 2.0 * strided[:, None])
    assert "launch" not in device.calls


def test_everything_is_given_back_once(bundle: Bundle) -> None:
    session, device, plan = engine_session(bundle)
    logits = feed(session, tokens(1))
    session.close()
    session.close()
    assert device.blocks == {} and device.closed and plan.closed
    assert Counter(device.calls)["release"] == 1
    np.testing.assert_array_equal(logits, expected(tokens(1)))
    with pytest.raises(SessionClosed):
        feed(session, tokens(1))


@pytest.mark.parametrize("limit", [0, 100, 400])
def test_out_of_memory_is_named_and_leaves_nothing(bundle: Bundle, limit: int) -> None:
    device = HostDevice(limit)
    plan = OnnxPlan(bundle, bundle.artifact("lm"), device)
    with pytest.raises(OutOfDeviceMemory, match=r"for inputs, states and outputs \(0 MB, at '\w+'\)") as caught:
        DeviceEngine(plan, device, bundle.artifact("lm"))
    assert caught.value.where == "lm (tensorrt/typed/fp16)" and caught.value.way_out
    assert device.blocks == {} and device.closed and plan.closed


def test_each_thread_makes_the_device_its_own(bundle: Bundle) -> None:
    session, device, _ = engine_session(bundle)
    ids = tokens(6)
    for part in (ids[:, :3], ids[:, 3:]):
        device.calls.clear()
        worker = threading.Thread(target=feed, args=(session, part))
        worker.start()
        worker.join()
        assert device.calls[0] == "enter"
    assert session.position == 6


def test_a_step_of_a_model_without_such_a_head(tmp_path: Path) -> None:
    session, device, _ = engine_session(tiny_engine_bundle(tmp_path / "plain", head=False))
    ids = tokens(5)
    np.testing.assert_array_equal(feed(session, ids), expected(ids))
    assert session.candidates == 0 and Counter(device.calls)["to_device"] == 2


@pytest.mark.parametrize("kind", [TYPED, FUSED], ids=lambda kind: kind[0])
def test_the_students_own_files_run_like_this(tiny_student: Path, tmp_path: Path, kind: Kind) -> None:
    """Names, types, ranges and states of a real artifact, "delta" and "aliased": pieces give what ONNX Runtime's own
    session of the file gives, to float16's last bits."""
    made = exported(tiny_student, "lm", JETSON, kind)
    real = made.bundle(tmp_path)
    ids = np.random.default_rng(1).integers(0, real.vocab_size, (1, 12)).astype(np.int32)
    with open_session(real, made.artifact) as whole:
        wanted = np.array(whole.run({"ids": ids})["logits"])
    session, device, _ = engine_session(real)
    with session:
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            got = np.array(session.run({"ids": ids[:, begin:end]})["logits"])
        np.testing.assert_allclose(got, wanted, atol=5e-3 * np.abs(wanted).max())
        assert Counter(device.calls)["launch"] == 2
        if session.candidates:
            session.reset()
            _, best = session.run_top({"ids": ids}, 0, real.vocab_size)
            assert best[0] == got.argmax()
