"""Engines built and refused by TensorRT-RTX itself, which builds on a CPU: the calls are TensorRT's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from runtimes import engines
from runtimes.bundle import Bundle
from runtimes.engines import WrongEngine
from runtimes.engines_build import BuildFailed, ParserRejected, build_engine
from runtimes.tensorrt_plan import TensorRtPlan
from tests.runtimes.engine_maker import tiny_engine_bundle

tensorrt_rtx: Any = pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tiny_engine_bundle(tmp_path / "bundle")


def build(bundle: Bundle, component: str = "audio_decoder") -> bytes:
    engine, packaging = build_engine(bundle, bundle.artifact(component), tensorrt_rtx, 64)
    assert packaging == "none"
    return engine


def write_model(bundle: Bundle, *nodes: onnx.NodeProto) -> None:
    codes = helper.make_tensor_value_info("codes", TensorProto.INT32, ["B", "T"])
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["B", 1, "T"])
    graph = helper.make_graph(nodes, "tiny", [codes], [audio])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("other", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    bundle.file(bundle.artifact("audio_decoder").model).write_bytes(model.SerializeToString())


def test_an_engine_is_built_and_nothing_else_is_written(bundle: Bundle) -> None:
    """TensorRT-RTX times no kernels while it builds: there is no timing cache to keep."""
    assert len(build(bundle)) > 1000
    assert not (bundle.folder / engines.FOLDER).exists()


def test_a_rejection_names_node_and_operator(bundle: Bundle) -> None:
    write_model(bundle, helper.make_node("Marvel", ["codes"], ["audio"], name="the_culprit", domain="other"))
    with pytest.raises(ParserRejected, match=r"the parser rejects node the_culprit \(Marvel\): .+") as caught:
        build(bundle)
    assert caught.value.where == "audio_decoder (tensorrt/typed/fp16)"


@pytest.mark.parametrize("content", [b"", b"no protobuf at all"])
def test_a_file_without_a_graph(bundle: Bundle, content: bytes) -> None:
    bundle.file(bundle.artifact("audio_decoder").model).write_bytes(content)
    with pytest.raises(ParserRejected):
        build(bundle)


def test_a_failed_build_says_why_and_leaves_nothing(bundle: Bundle) -> None:
    """The language model's tiny graph makes shapes of a value, for which no range is given."""
    with pytest.raises(BuildFailed, match="missing values for shape input tensor last"):
        build(bundle, "lm")
    assert not (bundle.folder / engines.FOLDER).exists()


@pytest.mark.parametrize("spoil", ["empty", "other", "short"])
def test_bytes_that_are_no_engine(bundle: Bundle, spoil: str) -> None:
    engine = build(bundle)
    bad = {"empty": b"", "other": b"no engine at all" * 100, "short": engine[:-7]}[spoil]
    with pytest.raises(WrongEngine, match=r"tensorrt_rtx .* does not take the engine: .*deserialize"):
        TensorRtPlan(bad, bundle.artifact("audio_decoder"), tensorrt_rtx, 0)


def test_ranges_of_the_options_are_the_engines(bundle: Bundle) -> None:
    """A range for less than the graph's own fixed sizes cannot be built."""
    artifact = bundle.artifact("audio_decoder")
    write_model(
        bundle,
        helper.make_node("Cast", ["codes"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 1, 9]),
        helper.make_node("Reshape", ["real", "shape"], ["audio"]),
    )
    only = replace(artifact, options={**artifact.options, "ranges": {"any": {"codes": [[2, 9]] * 3}}})
    assert build_engine(bundle, only, tensorrt_rtx, None)[0]
    with pytest.raises(BuildFailed):
        other = {"any": {"codes": [[1, 4]] * 3}}
        build_engine(bundle, replace(artifact, options={**artifact.options, "ranges": other}), tensorrt_rtx, None)
