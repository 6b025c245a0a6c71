"""Every wrong input of a session ends in a typed error that names it, and leaves the session usable."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.bundle import load_bundle
from runtimes.session import (
    CheckedSession,
    KvOverflow,
    OutOfDeviceMemory,
    RuntimeInputError,
    SessionBusy,
    SessionClosed,
    choose_artifact,
    open_session,
)
from tests.refusals import raises
from tests.runtimes.eager_lm import open_eager_decoder, open_eager_lm


@pytest.fixture(params=["torch", "onnx"])
def lm(request: pytest.FixtureRequest) -> Iterator[CheckedSession]:
    """A language model of each backend."""
    if request.param == "torch":
        with open_eager_lm() as session:
            yield session
    else:
        bundle = load_bundle(request.getfixturevalue("tiny_bundle"))
        with open_session(bundle, choose_artifact(bundle, "lm"), threads=1) as session:
            yield session


@pytest.fixture(params=["torch", "onnx"])
def decoder(request: pytest.FixtureRequest) -> Iterator[CheckedSession]:
    """An image decoder of each backend; a code grid of 4x4."""
    if request.param == "torch":
        with open_eager_decoder() as session:
            yield session
    else:
        bundle = load_bundle(request.getfixturevalue("tiny_bundle"))
        with open_session(bundle, choose_artifact(bundle, "image_decoder"), threads=1) as session:
            yield session


def vocabulary(session: CheckedSession) -> int:
    size = session.artifact.outputs[0].shape[-1]
    assert isinstance(size, int)
    return size


def still_works(session: CheckedSession) -> None:
    session.reset()
    logits = session.run({"ids": np.array([[1, 2]], np.int32)})["logits"]
    assert np.isfinite(logits).all()
    assert session.position == 2


@pytest.mark.parametrize("token", [-1, -(2**31), "vocab", 2**31 - 1])
@pytest.mark.parametrize("place", ["alone", "in a prompt"])
def test_a_token_outside_the_vocabulary(lm: CheckedSession, token: Any, place: str) -> None:
    value = vocabulary(lm) if token == "vocab" else token
    ids = [[value]] if place == "alone" else [[0, 1, value, 2]]
    with raises(RuntimeInputError, match=rf"input 'ids': value {value} is outside 0\.\.{vocabulary(lm) - 1}"):
        lm.run({"ids": np.array(ids, np.int32)})
    assert lm.position == 0
    still_works(lm)


def test_length_zero(lm: CheckedSession) -> None:
    with raises(RuntimeInputError, match="empty"):
        lm.run({"ids": np.zeros((1, 0), np.int32)})
    still_works(lm)


def test_longer_than_the_context(lm: CheckedSession) -> None:
    with raises(KvOverflow, match=rf"{lm.capacity + 1} new > {lm.capacity}"):
        lm.run({"ids": np.zeros((1, lm.capacity + 1), np.int32)})
    still_works(lm)


def test_a_full_cache(lm: CheckedSession) -> None:
    lm.run({"ids": np.zeros((1, lm.capacity), np.int32)})
    with raises(KvOverflow, match="Call reset"):
        lm.run({"ids": np.zeros((1, 1), np.int32)})
    assert lm.position == lm.capacity
    still_works(lm)


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint32", "float32", "bool", ">i4", "object"])
def test_a_wrong_dtype_or_byte_order(lm: CheckedSession, dtype: str) -> None:
    with raises(RuntimeInputError, match="dtype") as caught:
        lm.run({"ids": np.array([[1, 2]]).astype(dtype)})
    assert "astype" in caught.value.way_out
    still_works(lm)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1, 2), (2, 2)])
def test_a_wrong_rank_or_batch(lm: CheckedSession, shape: tuple[int, ...]) -> None:
    with raises(RuntimeInputError, match="shape"):
        lm.run({"ids": np.zeros(shape, np.int32)})
    still_works(lm)


def test_any_stride_is_copied_and_gives_the_same(lm: CheckedSession) -> None:
    ids = np.array([[3, 1, 4, 1, 5]], np.int32)
    expected = lm.run({"ids": ids})["logits"].copy()
    spread = np.zeros((1, 10), np.int32)
    spread[:, ::2] = ids
    for strided in (spread[:, ::2], np.ascontiguousarray(ids[:, ::-1])[:, ::-1]):
        assert not strided.flags.c_contiguous
        lm.reset()
        np.testing.assert_array_equal(lm.run({"ids": strided})["logits"], expected)
    lm.reset()
    lm.run({"ids": np.broadcast_to(np.int32(1), (1, 5))})
    assert lm.position == 5


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "input 'ids': is missing"),
        ({"tokens": np.ones((1, 1), np.int32)}, "input 'ids': is missing"),
        ({"ids": [[1, 2]]}, "is a list, not a numpy array"),
        ({"ids": np.ones((1, 1), np.int32), "mask": np.ones(1)}, "unknown input 'mask'"),
        ({"ids": np.ones((1, 1), np.int32), "last": np.zeros(1, np.int32)}, "unknown input 'last'"),
    ],
    ids=["none", "other name", "list", "extra", "position"],
)
def test_missing_and_unknown_inputs(lm: CheckedSession, feeds: dict[str, Any], text: str) -> None:
    with raises(RuntimeInputError, match=text):
        lm.run(feeds)
    still_works(lm)


def test_use_after_close(lm: CheckedSession) -> None:
    lm.close()
    lm.close()
    for use in (lambda: lm.run({"ids": np.ones((1, 1), np.int32)}), lm.reset):
        with raises(SessionClosed, match="open_session"):
            use()


def test_two_threads_at_once(lm: CheckedSession) -> None:
    """Threads that collide get SessionBusy; every step that was let in counts, once."""
    started = threading.Barrier(4)
    busy, done, other = [], [], []

    def work() -> None:
        started.wait()
        for _ in range(200):
            try:
                if lm.position == lm.capacity:
                    return
                lm.run({"ids": np.ones((1, 1), np.int32)})
                done.append(1)
            except SessionBusy as error:
                busy.append(error)
            except KvOverflow:
                return
            except Exception as error:  # reported by the assertion below, which a thread cannot do
                other.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other == []
    assert lm.position == len(done)
    assert all("own session" in error.way_out for error in busy)
    still_works(lm)


def test_a_second_thread_inside_a_step_is_refused() -> None:
    """The collision itself, without chance: the second thread comes while the first is inside."""
    inside, leave = threading.Event(), threading.Event()
    session = open_eager_decoder()
    lookup = session._step
    assert lookup is not None

    def slow(codes: Any) -> Any:
        inside.set()
        assert leave.wait(30)
        return lookup(codes)

    session._step = slow
    codes = {"codes": np.zeros((1, 4, 4), np.int32)}
    thread = threading.Thread(target=session.run, args=(codes,))
    thread.start()
    try:
        assert inside.wait(30)
        for use in (lambda: session.run(codes), session.reset, session.close):
            with raises(SessionBusy):
                use()
    finally:
        leave.set()
        thread.join()
    assert session.run(codes)["image"].shape == (1, 1, 4, 4)


@pytest.mark.parametrize("code", [-1, "size", 2**31 - 1])
def test_a_code_outside_the_codebook(decoder: CheckedSession, code: Any) -> None:
    size = decoder._checks[0].high
    assert size is not None
    codes = np.zeros((1, 4, 4), np.int32)
    codes[0, 2, 3] = size if code == "size" else code
    with raises(RuntimeInputError, match=r"input 'codes': value .* is outside 0\.\."):
        decoder.run({"codes": codes})
    assert np.isfinite(decoder.run({"codes": np.ones((1, 4, 4), np.int32)})["image"]).all()


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 3, 4), (4, 4), (1, 16), (1, 1, 4, 4), (0, 4, 4)])
def test_a_wrong_grid(decoder: CheckedSession, shape: tuple[int, ...]) -> None:
    with raises(RuntimeInputError, match="input 'codes'"):
        decoder.run({"codes": np.zeros(shape, np.int32)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_with_nan_into_an_encoder(tiny_bundle: Path, value: float) -> None:
    bundle = load_bundle(tiny_bundle)
    artifact = choose_artifact(bundle, "image_encoder")
    shape = [size if isinstance(size, int) else 1 for size in artifact.inputs[0].shape]
    image = np.zeros(shape, np.float32)
    image.flat[5] = value
    with (
        open_session(bundle, artifact, threads=1) as session,
        raises(RuntimeInputError, match="NaN or infinity"),
    ):
        session.run({artifact.inputs[0].name: image})


def test_out_of_memory_in_torch() -> None:
    session = open_eager_decoder()
    lookup = session._step
    assert lookup is not None
    codes = {"codes": np.zeros((1, 4, 4), np.int32)}
    session._step = lambda _: torch.empty(1 << 52)
    with raises(OutOfDeviceMemory, match="image_decoder") as caught:
        session.run(codes)
    assert "smaller batch" in caught.value.way_out
    session._step = lookup
    assert session.run(codes)["image"].shape == (1, 1, 4, 4)


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from runtimes.bundle import load_bundle
from runtimes.session import OutOfDeviceMemory, choose_artifact, open_session

bundle = load_bundle(sys.argv[1])
with open_session(bundle, choose_artifact(bundle, "image_decoder"), threads=1) as session:
    codes = np.zeros((1 << 16, 4, 4), np.int32)
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (256 << 20), -1))
    try:
        session.run({"codes": codes})
    except OutOfDeviceMemory as error:
        print(error)
    print(session.run({"codes": codes[:1]})["image"].shape)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to set the limit")
def test_out_of_memory_in_onnx_runtime_leaves_the_session_usable(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusal, shape = done.stdout.strip().rsplit("\n", 1)
    assert refusal.startswith("image_decoder (onnx")
    assert shape.startswith("(1, ")
