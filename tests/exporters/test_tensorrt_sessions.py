"""Sessions on the files that engines are built from: the cache in pieces, the head's own choice, values inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from exporters.program import Program
from exporters.tensorrt_ import TensorRtExporter
from runtimes.session import CheckedSession, KvOverflow, RuntimeInputError, open_session
from tests.tensorrt_maker import CAPACITY, FUSED, JETSON, RTX, TYPED, VOCAB, Exported, exported

#: Name -> device and form: a cache that the session writes, one that our kernels write, one that TensorRT writes.
FORMS = {"delta": (JETSON, TYPED), "fused": (JETSON, FUSED), "native": (RTX, TYPED)}
IDS = np.random.default_rng(7).integers(0, VOCAB, (1, 24)).astype(np.int32)
#: Ways to cut the ids into runs.
CUTS = ((24,), (9, 1, 1, 13), (1, 22, 1), (5, 5, 5, 5, 4))
#: Of logits in float16 against float32, as a share of the largest.
TOLERANCE = 0.02


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tiny_student: Path) -> Exported:
    return exported(tiny_student, "lm", *FORMS[request.param])


@pytest.fixture(scope="module")
def fused(tiny_student: Path) -> Exported:
    return exported(tiny_student, "lm", *FORMS["fused"])


def filled(program: Program) -> torch.nn.Module:
    """The Program in float32 with its weights."""
    module = program.exported.module(check_guards=False)
    held = {name: torch.from_numpy(constant.load()) for name, constant in program.constants.items()}
    module.load_state_dict(held, strict=False, assign=True)
    return module


@contextmanager
def session_of(made: Exported, scratch: Path) -> Iterator[CheckedSession]:
    with open_session(made.bundle(scratch), made.artifact, 1) as session:
        yield session


def logits(session: CheckedSession, cut: tuple[int, ...] = (24,)) -> np.ndarray:
    """Of the last token of IDS, appended in pieces to what the session holds."""
    start, result = 0, np.empty(0)
    for size in cut:
        result = np.array(session.run({"ids": IDS[:, start : start + size]})["logits"])
        start += size
    return result


@pytest.fixture(scope="module")
def reference(fused: Exported) -> np.ndarray:
    """The Program in float32, by PyTorch."""
    caches = [torch.zeros(state.shape) for state in fused.program.states]
    with torch.no_grad():
        return filled(fused.program)(torch.from_numpy(IDS), torch.tensor([23], dtype=torch.int32), *caches)[0].numpy()


def test_the_cache_in_pieces_is_the_whole(made: Exported, reference: np.ndarray, tmp_path: Path) -> None:
    with session_of(made, tmp_path) as session:
        assert session.stand_in and "ONNX Runtime" in session.stand_in
        assert session.capacity == CAPACITY
        for cut in CUTS:
            got = logits(session, cut)
            assert got.shape == (1, VOCAB) and got.dtype == np.float32
            assert np.abs(got - reference).max() < TOLERANCE * np.abs(reference).max(), cut
            assert session.position == 24
            session.reset()


def test_reset_forgets(made: Exported, tmp_path: Path) -> None:
    with session_of(made, tmp_path) as session:
        first = logits(session)
        longer = logits(session)  # behind the same ids, which it sees
        assert not np.array_equal(first, longer)
        session.reset()
        assert session.position == 0
        np.testing.assert_array_equal(logits(session), first)


def test_a_full_cache_refuses_and_goes_on(made: Exported, tmp_path: Path) -> None:
    with session_of(made, tmp_path) as session:
        session.run({"ids": np.resize(IDS, (1, CAPACITY - 1))})
        with pytest.raises(KvOverflow, match=rf"{CAPACITY - 1} tokens held \+ 2 new > {CAPACITY}"):
            session.run({"ids": IDS[:, :2]})
        last = np.array(session.run({"ids": IDS[:, :1]})["logits"])
        assert np.isfinite(last).all() and session.position == CAPACITY
        with pytest.raises(KvOverflow):
            session.run({"ids": IDS[:, :1]})
        session.reset()
        assert np.isfinite(logits(session)).all()


def test_two_sessions_share_nothing(made: Exported, tmp_path: Path) -> None:
    with session_of(made, tmp_path / "a") as one, session_of(made, tmp_path / "b") as other:
        expected = logits(one, (12, 12))
        one.reset()
        one.run({"ids": IDS[:, :12]})
        other.run({"ids": IDS[:, 12:]})
        np.testing.assert_array_equal(np.array(one.run({"ids": IDS[:, 12:]})["logits"]), expected)


# --- the head that picks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(fused: Exported) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(fused.path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, VOCAB), (0, 64), (72, 104), (104, VOCAB), (64, 65), (40, 120), (1, VOCAB - 1)],
    ids=lambda value: str(value),
)
def test_the_files_candidates_are_the_largest_logits(
    fused: Exported, graph: onnxruntime.InferenceSession, first: int, end: int
) -> None:
    feeds = {state.input: np.zeros(state.shape, state.dtype) for state in fused.artifact.states}
    feeds |= {"ids": IDS, "last": np.array([IDS.size - 1], np.int32)}
    names = ["logits", "top_values", "top_ids"]
    [whole] = graph.run(["logits"], {**feeds, "rows": np.array([0, VOCAB], np.int32)})
    inside, values, ids = graph.run(names, {**feeds, "rows": np.array([first, end], np.int32)})
    np.testing.assert_array_equal(inside[:, first:end], whole[:, first:end])
    assert (np.delete(inside, np.s_[first:end], 1) == -np.inf).all()
    count = min(values.shape[1], end - first)
    order = first + np.argsort(-whole[0, first:end], kind="stable")[:count]
    np.testing.assert_array_equal(ids[0, :count], order)
    np.testing.assert_array_equal(values[0, :count], whole[0, order])
    assert (ids[0, count:] == -1).all() and (values[0, count:] == -np.inf).all()


def test_a_session_picks_and_goes_on(fused: Exported, tmp_path: Path) -> None:
    with session_of(fused, tmp_path) as session:
        expected = [logits(session, cut)[0] for cut in ((20,), (4,))]
        session.reset()
        assert session.candidates == 64
        for piece, wanted in zip((IDS[:, :20], IDS[:, :4]), expected, strict=True):
            values, ids = session.run_top({"ids": piece}, 72, 104)
            assert len(ids) == len(values) == 32
            order = 72 + np.argsort(-wanted[72:104], kind="stable")
            np.testing.assert_array_equal(ids, order)
            np.testing.assert_array_equal(values, wanted[order])
        assert session.position == 24
        # The range does not stay: a plain step gives the whole vocabulary.
        assert np.isfinite(np.array(session.run({"ids": IDS[:, :1]})["logits"])).all()


@pytest.mark.parametrize(("first", "end"), [(-1, 5), (5, 5), (9, 3), (0, VOCAB + 1)])
def test_a_range_that_is_none_is_refused(fused: Exported, tmp_path: Path, first: int, end: int) -> None:
    with session_of(fused, tmp_path) as session:
        with pytest.raises(RuntimeInputError, match=rf"rows {first}\.\.{end - 1} of {VOCAB}"):
            session.run_top({"ids": IDS}, first, end)
        assert session.position == 0


def test_a_form_without_such_a_head_says_so(tiny_student: Path, tmp_path: Path) -> None:
    with session_of(exported(tiny_student, "lm", JETSON, TYPED), tmp_path) as session:
        assert session.candidates == 0
        with pytest.raises(RuntimeInputError, match="no such head"):
            session.run_top({"ids": IDS}, 0, 5)


# --- values inside --------------------------------------------------------------------------------------------------


def test_values_inside_are_the_programs_own(made: Exported, tmp_path: Path) -> None:
    """A name stands for the Program's value of that name, whatever passes and a second tracing made of the graph."""
    nodes = [node.name for node in made.program.exported.graph.nodes if node.op == "call_function"]
    exporter = TensorRtExporter()
    observed, names = exporter.observe(made.folder, made.artifact, made.program, [*nodes, "no_such_node"], tmp_path)
    assert "no_such_node" not in names and sum(name.startswith("kv_attention") for name in names) == 2
    products = {node for node in nodes if node.startswith("quantized_linear")}
    assert len(products) == 9 and (products <= set(names)) == (made.artifact.form == "typed")
    expected = values_of(made.program)
    copy = replace(made, artifact=observed, folder=tmp_path)
    with session_of(copy, tmp_path / "scratch") as session:
        outputs = session.run({"ids": IDS})
        got = {node: np.array(outputs[name]) for node, name in names.items() if name in outputs}
    assert len(got) >= 3
    for node, value in got.items():
        wanted = expected[node][0] if isinstance(expected[node], (tuple, list)) else expected[node]
        assert value.shape == tuple(wanted.shape), node
        assert np.abs(value - wanted.numpy()).max() <= TOLERANCE * np.abs(wanted.numpy()).max(), node


def values_of(program: Program) -> dict[str, Any]:
    """Every node's value for IDS in float32, by PyTorch."""
    values: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            return values[node.name]

    caches = [torch.zeros(state.shape) for state in program.states]
    with torch.no_grad():
        Recorder(filled(program)).run(torch.from_numpy(IDS), torch.tensor([23], dtype=torch.int32), *caches)
    return values


# --- decoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["audio_decoder", "image_decoder"])
def test_a_decoders_kernels_are_the_decoder(entry: str, tiny_student: Path, tmp_path: Path) -> None:
    made = exported(tiny_student, entry, JETSON, FUSED)
    [spec] = made.artifact.inputs
    size = made.student.modalities[entry.split("_")[0]].codebook_size
    module = filled(made.program)
    with session_of(made, tmp_path) as session:
        for length in (2, 5):
            shape = [length if isinstance(each, str) else each for each in spec.shape]
            codes = np.random.default_rng(length).integers(0, size, shape).astype(spec.dtype)
            [got] = (np.array(value) for value in session.run({spec.name: codes}).values())
            with torch.no_grad():
                result = module(torch.from_numpy(codes))
            expected = (result[0] if isinstance(result, tuple) else result).numpy()
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max()
