"""TensorRT-RTX on the build machine: engines without a GPU, layers, and how it says what it does not take."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import tensorrt_rtx
from exporters.tensorrt_layers import patterns
from exporters.tensorrt_rtx import CAPABILITIES, EngineFailed, Layer, ParserRejected, compile_file
from tests.tensorrt_maker import FUSED, JETSON, RTX, TYPED, Exported, exported

pytestmark = pytest.mark.skipif(not tensorrt_rtx.installed(), reason=f"{tensorrt_rtx.PACKAGE} is not installed")

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(scope="module")
def native(tiny_student: Path) -> Exported:
    return exported(tiny_student, "lm", RTX, TYPED)


def saved(
    path: Path, nodes: list[onnx.NodeProto], x: list[int | str], y: list[int | str], **weights: onnx.TensorProto
) -> Path:
    """A model of float16 from x to y."""
    infos = [[helper.make_tensor_value_info(name, HALF, shape)] for name, shape in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "g", *infos, list(weights.values()))
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def product(path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((32, 8), np.float16), "w")
    return saved(
        path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="the_product")], ["S", 32], ["S", 8], w=weight
    )


# --- engines --------------------------------------------------------------------------------------------------------


def test_an_rtx_artifact_has_an_engine_and_others_a_proxys_layers(native: Exported, tiny_student: Path) -> None:
    options = native.artifact.options
    assert options["compiled"]["status"] == "built" and options["compiled"]["capability"] == "SM89"
    assert options["engine"] == "tensorrt/lm.typed.fp16.engine" and options["engine"] in native.artifact.files
    assert (native.folder / options["engine"]).stat().st_size > 10_000
    proxy = exported(tiny_student, "lm", JETSON, TYPED).artifact
    assert proxy.options["compiled"]["status"] == "proxy" and proxy.options["compiled"]["capability"] == "SM86"
    assert "engine" not in proxy.options and not [file for file in proxy.files if file.endswith(".engine")]
    kernels = exported(tiny_student, "lm", JETSON, FUSED).artifact  # which it takes through their bodies
    assert kernels.options["compiled"] == {
        "status": "parsed", "compiler": f"TensorRT-RTX {_version()}",
    }  # fmt: skip
    assert kernels.files == ("tensorrt/lm.fused.fp16.onnx", "tensorrt/lm.data")


def _version() -> str:
    from importlib.metadata import version

    return version("tensorrt_rtx")


def test_an_engine_is_the_same_from_another_folder(
    native: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in another environment: where things lie in the compiler's memory decides the order of some layers."""
    monkeypatch.setenv("SOMETHING_LONG", "x" * 5000)
    copy = tmp_path / "elsewhere" / "of another depth"
    shutil.copytree(native.folder, copy)
    built = compile_file(copy / native.artifact.model, "sm_89", native.artifact.options["ranges"])
    assert built.engine == (native.folder / native.artifact.options["engine"]).read_bytes()
    assert str(tmp_path).encode() not in built.engine and str(native.folder).encode() not in built.engine
    rows = json.loads((native.folder / "tensorrt/lm.typed.fp16.layers.json").read_text())
    assert [(layer.name, layer.kind, list(layer.nodes)) for layer in built.layers] == [
        (row["name"], row["kind"], row["nodes"]) for row in rows
    ]


def test_another_architecture_is_another_engine(tmp_path: Path) -> None:
    path, ranges = product(tmp_path / "m.onnx"), {"any": {"x": [[1, 32], [4, 32], [8, 32]]}}
    one, other, proxy = (compile_file(path, sm, ranges) for sm in ("sm_89", "sm_120", "sm_87"))
    assert one.own and other.own and not proxy.own
    assert (one.capability, other.capability, proxy.capability) == ("SM89", "SM120", "SM86")
    assert len({one.engine, other.engine, proxy.engine}) == 3
    parsed = compile_file(path, "sm_89", {}, engine=False)
    assert (parsed.engine, parsed.layers, parsed.capability) == (b"", (), "")


def test_every_architecture_of_a_profile_has_a_capability() -> None:
    from device_profiles import load_profile

    for name in (JETSON, "jetson-orin-nano", "jetson-thor", RTX, "h200"):
        assert load_profile(name).sm in CAPABILITIES


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_name_our_nodes_and_say_what_was_fused(native: Exported) -> None:
    compiled = native.artifact.options["compiled"]
    assert compiled["patterns"]["attention"] == {"fused": 2, "of": 2, "apart": []}
    products = compiled["patterns"]["quantised product"]
    # All projections with int4 weights; the int8 head is dequantised by a layer of its own.
    assert products["of"] == 9 and products["fused"] >= 8 and set(products["apart"]) <= {"lm_head/MatMul"}
    rows = json.loads((native.folder / "tensorrt/lm.typed.fp16.layers.json").read_text())
    assert len(rows) == compiled["layers"]
    named = {name for row in rows for name in row["nodes"]}
    assert {node.name for node in native.model.graph if node.op_type == "MatMul"} <= named


def pair(names: tuple[str, str] = ("dq", "mm")) -> ir.Model:
    """A quantised product, next to one whose weight is computed."""
    x, w, s = (ir.Value(name=name) for name in "xws")
    dequantise = ir.node("DequantizeLinear", [w, s], name=names[0])
    product = ir.node("MatMul", [x, dequantise.outputs[0]], name=names[1])
    plain = ir.node("MatMul", [x, s], name="plain")
    graph = ir.Graph([x, w, s], [product.outputs[0], plain.outputs[0]], nodes=[dequantise, product, plain])
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("layers", "fused"),
    [
        ([("dq", "mm")], True),
        ([("dq",), ("mm",)], False),
        ([("dq",), ("mm", "other")], False),
        ([("dq",), ("mm",), ("dq", "mm")], True),
        ([], False),
    ],
)
def test_a_pattern_is_fused_where_one_layer_has_both(layers: list[tuple[str, ...]], fused: bool) -> None:
    found = patterns(pair(), [Layer(f"layer{i}", "gemm", nodes) for i, nodes in enumerate(layers)])
    assert found == {"quantised product": {"fused": int(fused), "of": 1, "apart": [] if fused else ["mm"]}}


# --- what it does not take ------------------------------------------------------------------------------------------


def dequantised(path: Path, zero: int) -> Path:
    """A product with INT4 weights in blocks of 32 and explicit zero points, which TensorRT does not know."""
    int4 = TensorProto.INT4
    weights = {
        "w": helper.make_tensor("w", int4, (32, 8), np.zeros((32, 8), np.int8)),
        "s": numpy_helper.from_array(np.ones((1, 8), np.float16), "s"),
        "z": helper.make_tensor("z", int4, (1, 8), np.full((1, 8), zero, np.int8)),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="odd_weight", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="the_product"),
    ]
    return saved(path, nodes, ["S", 32], ["S", 8], **weights)


def stranger(path: Path) -> Path:
    """A node of a domain that has neither an importer nor a function."""
    nodes = [helper.make_node("Sparkle", ["x"], ["y"], name="the_stranger", domain="nowhere")]
    return saved(path, nodes, ["S", 8], ["S", 8])


def mixed(path: Path) -> Path:
    """float16 plus float32, which a strongly typed network refuses."""
    weight = numpy_helper.from_array(np.ones(8, np.float32), "w")
    return saved(path, [helper.make_node("Add", ["x", "w"], ["y"], name="two_types")], ["S", 8], ["S", 8], w=weight)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: dequantised(path, 3), r"node odd_weight \(DequantizeLinear\)"),
        (stranger, r"node the_stranger \(Sparkle\)"),
        (mixed, r"node two_types \(Add\)"),
    ],
    ids=["a zero point", "an unknown domain", "two types"],
)
def test_a_node_that_the_parser_rejects_is_named(make: Callable[[Path], Path], named: str, tmp_path: Path) -> None:
    path = make(tmp_path / "odd.onnx")
    with pytest.raises(ParserRejected, match=named) as caught:
        compile_file(path, "sm_89", {}, engine=False)
    assert caught.value.where == str(path) and f"TensorRT-RTX {_version()} rejects" in caught.value.what


def test_the_same_product_without_zero_points_is_taken(tmp_path: Path) -> None:
    assert compile_file(dequantised(tmp_path / "m.onnx", 0), "sm_89", {}, engine=False).compiler


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a\x12\x03abc"], ids=["empty", "text", "no graph"])
def test_a_file_that_is_no_model_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ParserRejected, match="rejects"):
        compile_file(tmp_path / "m.onnx", "sm_89", {}, engine=False)


def test_a_range_that_the_graph_does_not_allow_fails_with_the_compilers_words(tmp_path: Path) -> None:
    path = product(tmp_path / "m.onnx")
    with pytest.raises(EngineFailed, match=r"parsed it but built no engine: .+"):
        compile_file(path, "sm_89", {"any": {"x": [[1, 32], [4, 31], [8, 32]]}})


def interpreter(path: Path, lines: str) -> str:
    """A program in Python's place that does something first."""
    path.write_text(f'#!/bin/sh\n{lines}\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("kill -KILL $$", "the compiler was ended by SIGKILL"),
        ("kill -SEGV $$", "the compiler was ended by SIGSEGV"),
        ("echo what happened >&2; exit 3", "the compiler ended with 3: what happened"),
        ("exit 7", "the compiler ended with 7: no message"),
    ],
)
def test_a_compiler_that_dies_is_named_by_what_ended_it(
    lines: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = product(tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", lines))
    with pytest.raises(EngineFailed) as caught:
        compile_file(path, "sm_89", {}, engine=False)
    assert caught.value.what == named and caught.value.where == str(path)
    assert "more memory" in caught.value.way_out


def test_a_compiler_without_memory_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a gigabyte of addresses it gets as far as its library lets it: to an exception, or to its end."""
    path = product(tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "ulimit -v 500000"))
    ends = r"ran out of memory: .*bad_alloc|was ended by SIG\w+|ended with \d+: .+"
    with pytest.raises(EngineFailed, match=rf"({ends})\. Build on a machine with more memory\."):
        compile_file(path, "sm_89", {"any": {"x": [[1, 32], [4, 32], [8, 32]]}})


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    compile_file(product(tmp_path / "m.onnx"), "sm_89", {"any": {"x": [[1, 32], [4, 32], [8, 32]]}})
    with pytest.raises(ParserRejected):
        compile_file(stranger(tmp_path / "odd.onnx"), "sm_89", {}, engine=False)
    assert os.listdir(scratch) == []
