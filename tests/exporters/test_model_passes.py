"""Each model pass does what its docstring draws on a small ONNX model, and keeps off what looks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from device_profiles import load_profile
from exporters.external_data import THRESHOLD, WeightFile
from exporters.onnx_ import FORMS, for_profile, lower
from exporters.passes.attach_weights import attach_weights
from exporters.passes.context import Context
from exporters.passes.map_tables import map_tables
from exporters.passes.mark_origins import MODULE, NODE
from exporters.passes.settle_reshapes import settle_reshapes
from exporters.passes.spell_gemms import spell_gemms
from exporters.passes.transpose_tables import transpose_tables
from exporters.passes.transpose_weights import transpose_weights
from exporters.passes.untie_tables import ROWS, untie_tables
from exporters.program import Constant, Program
from tests.exporters.small_models import RANDOM, layer_program, model_of, operators, run


@pytest.fixture(scope="module")
def program() -> Program:
    return layer_program()


# --- transpose_weights ----------------------------------------------------------------------------------------------


def product(*others: onnx.NodeProto) -> tuple[ir.Model, np.ndarray]:
    weight = RANDOM.random((4, 6), np.float32)
    nodes = [
        helper.make_node("Transpose", ["W"], ["T"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "T"], ["y"]),
        *others,
    ]
    outputs: dict[str, list[int | str]] = {"y": [2, 4]} | {node.output[0]: ["A", "B"] for node in others}
    return model_of(nodes, {"x": [2, 6]}, outputs, W=weight), weight


def test_transpose_weights_writes_the_weight_turned(program: Program) -> None:
    model, weight = product()
    transpose_weights(model, Context(program))
    assert operators(model) == ["MatMul"]
    assert model.graph.initializers["W"].const_value.numpy().flags.c_contiguous
    np.testing.assert_array_equal(model.graph.initializers["W"].const_value.numpy(), weight.T)
    x = RANDOM.random((2, 6), np.float32)
    np.testing.assert_allclose(run(model, x=x), x @ weight.T, rtol=1e-6)


def test_transpose_weights_leaves_a_shared_weight(program: Program) -> None:
    model, weight = product(helper.make_node("Relu", ["W"], ["z"]))
    transpose_weights(model, Context(program))
    assert "Transpose" in operators(model)
    np.testing.assert_array_equal(model.graph.initializers["W"].const_value.numpy(), weight)


def test_transpose_weights_leaves_what_is_computed(program: Program) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["T"], perm=[1, 0]), helper.make_node("Relu", ["T"], ["y"])]
    model = model_of(nodes, {"x": [2, 6]}, {"y": [6, 2]})
    transpose_weights(model, Context(program))
    assert operators(model) == ["Transpose", "Relu"]


# --- transpose_tables, spell_gemms, map_tables ----------------------------------------------------------------------


def gemm(rows: int, bias: bool, gathered: bool, **attributes: float) -> tuple[ir.Model, dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    weights = {"W": random.random((9, 6), np.float32)} | ({"b": random.random(9, np.float32)} if bias else {})
    nodes = [helper.make_node("Gemm", ["x", *weights], ["y"], transB=1, **attributes)]
    outputs: dict[str, list[int | str]] = {"y": [rows, 9]}
    if gathered:
        nodes.append(helper.make_node("Gather", ["W", "at"], ["z"]))
        weights["at"] = np.array([[4, 0, 8]])
        outputs["z"] = [1, 3, 6]
    return model_of(nodes, {"x": [rows, 6]}, outputs, **weights), weights


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_products_with_float_matrices_are_the_fastest_with_the_same_weights(
    rows: int, bias: bool, gathered: bool, program: Program
) -> None:
    model, weights = gemm(rows, bias, gathered)
    x = np.random.default_rng(2).random((rows, 6), np.float32)
    expected = x @ weights["W"].T + weights.get("b", 0)
    for edit in (transpose_tables, spell_gemms, map_tables):
        edit(model, Context(program))
        np.testing.assert_allclose(run(model, x=x), expected, rtol=1e-6)
    product = {1: "MatMul", 2: "FusedMatMul"}[rows]
    assert operators(model) == [product, *["Add"] * bias, *["Gather", "Transpose"][: gathered * (3 - rows)]]
    stored = model.graph.initializers["W"].const_value.numpy()
    np.testing.assert_array_equal(stored if rows == 2 else stored.T, weights["W"])
    # As an input with a default value it is not copied by the runtime.
    assert [value.name for value in model.graph.inputs] == ["x", "W"][: 1 + (gathered or rows == 1)]
    assert [value.name for value in model.graph.outputs] == ["y", "z"][: 1 + gathered]


def test_rows_of_a_transposed_table_are_the_rows_of_the_table(program: Program) -> None:
    model, weights = gemm(1, bias=False, gathered=True)
    transpose_tables(model, Context(program))
    found = run(model, output=1, x=np.zeros((1, 6), np.float32))
    np.testing.assert_array_equal(found, weights["W"][weights["at"]])


@pytest.mark.parametrize("attributes", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
def test_other_products_are_left(attributes: dict[str, float], program: Program) -> None:
    model, weights = gemm(1, bias=True, gathered=True, **attributes)
    for edit in (transpose_tables, spell_gemms, map_tables):
        edit(model, Context(program))
    assert operators(model) == ["Gemm", "Gather"]
    np.testing.assert_array_equal(model.graph.initializers["W"].const_value.numpy(), weights["W"])


def test_a_table_with_another_reader_keeps_its_layout(program: Program) -> None:
    model, weights = gemm(1, bias=False, gathered=True)
    model.graph.append(ir.node("Relu", [model.graph.initializers["W"]]))
    transpose_tables(model, Context(program))
    assert operators(model)[:2] == ["Gemm", "Gather"]
    np.testing.assert_array_equal(model.graph.initializers["W"].const_value.numpy(), weights["W"])


# --- untie_tables ---------------------------------------------------------------------------------------------------


def tied(gathers: int) -> tuple[ir.Model, np.ndarray]:
    """A product and look-ups with one table that is large enough to stand in a file."""
    table = RANDOM.random((16, 6), np.float32)
    assert table.nbytes > THRESHOLD
    names = [f"z{i}" for i in range(gathers)]
    nodes = [
        helper.make_node("Gemm", ["x", "W"], ["y"], transB=1),
        *(helper.make_node("Gather", ["W", "at"], [name]) for name in names),
    ]
    outputs: dict[str, list[int | str]] = {"y": [2, 16]} | {name: [3, 6] for name in names}
    return model_of(nodes, {"x": [2, 6]}, outputs, W=table, at=np.array([4, 0, 15])), table


@pytest.mark.parametrize("gathers", [1, 2])
def test_the_look_ups_of_a_packed_table_read_the_same_place_by_another_name(
    gathers: int, program: Program, tmp_path: Path
) -> None:
    model, table = tied(gathers)
    untie_tables(model, Context(program))
    assert [node.inputs[int(node.op_type == "Gemm")].name for node in model.graph] == ["W", *["W" + ROWS] * gathers]
    x = RANDOM.random((2, 6), np.float32)
    np.testing.assert_allclose(run(model, x=x), x @ table.T, rtol=1e-6)
    np.testing.assert_array_equal(run(model, output=gathers, x=x), table[[4, 0, 15]])
    with WeightFile(tmp_path / "weights") as file:
        file.adopt(model)
    assert (tmp_path / "weights").stat().st_size == table.nbytes
    np.testing.assert_array_equal(model.graph.initializers["W" + ROWS].const_value.numpy(), table)


@pytest.mark.parametrize("gathers", [0, 1])
def test_a_table_that_is_not_tied_or_not_packed_keeps_its_name(gathers: int, program: Program) -> None:
    model, _ = tied(gathers)
    if gathers:
        model.graph.inputs.append(model.graph.initializers["W"])
    untie_tables(model, Context(program))
    assert "W" + ROWS not in model.graph.initializers


@pytest.mark.parametrize(("profile", "untied"), [("host", True), ("browser-wasm", False)])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_where_no_file_is_mapped_a_table_is_not_copied(mode: str, profile: str, untied: bool) -> None:
    recipe = for_profile(FORMS["fused", mode], load_profile(profile))
    assert (untie_tables in recipe.passes) == untied


# --- the small ones -------------------------------------------------------------------------------------------------


def reshaped(output: list[int | str]) -> ir.Model:
    nodes = [
        helper.make_node("Shape", ["x"], ["b"], start=0, end=1),
        helper.make_node("Concat", ["b", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    return model_of(nodes, {"x": ["B", 6, "T"]}, {"y": output}, rest=np.array([2, -1]))


def test_settle_reshapes_makes_the_target_constant(program: Program) -> None:
    model = reshaped(["B", 2, 12])
    settle_reshapes(model, Context(program))
    assert operators(model) == ["Reshape"]
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), [-1, 2, 12])
    x = RANDOM.random((3, 6, 4), np.float32)
    np.testing.assert_array_equal(run(model, x=x), x.reshape(3, 2, 12))


@pytest.mark.parametrize("output", [["B", 2, "R"], ["B", 0, 12]], ids=["two free sizes", "an empty tensor"])
def test_settle_reshapes_leaves_what_it_cannot_settle(output: list[int | str], program: Program) -> None:
    model = reshaped(output)
    settle_reshapes(model, Context(program))
    assert operators(model) == ["Shape", "Concat", "Reshape"]


def test_attach_weights_loads_when_asked(program: Program) -> None:
    loaded = []

    def load() -> np.ndarray:
        loaded.append(True)
        return np.full((4, 6), 7, np.float32)

    own = Program("lm", program.exported, (), (), constants={"W": Constant("float32", (4, 6), load)})
    model, _ = product(helper.make_node("Relu", ["V"], ["z"]))
    kept = RANDOM.random((2, 2), np.float32)
    model.graph.register_initializer(ir.Value(name="V", const_value=ir.Tensor(kept, name="V")))
    attach_weights(model, Context(own))
    assert not loaded
    np.testing.assert_array_equal(model.graph.initializers["W"].const_value.numpy(), np.full((4, 6), 7))
    np.testing.assert_array_equal(model.graph.initializers["V"].const_value.numpy(), kept)
    assert loaded


# --- mark_origins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [("fused", "exact"), ("standard", "exact")], ids="/".join)
def test_mark_origins_names_the_program(form: tuple[str, str], program: Program, tmp_path: Path) -> None:
    model = lower(program, FORMS[form])
    names = {node.name for node in program.exported.graph.nodes}
    marked = {node.op_type: dict(node.metadata_props) for node in model.graph}
    assert all(row[NODE] in names for row in marked.values())
    assert all(set(row) <= {NODE, MODULE} for row in marked.values())
    weighted = {"fused": "MatMulNBits", "standard": "MatMul"}[form[0]]
    assert marked[weighted] == {NODE: "quantized_linear", MODULE: "layer"}
    assert marked["RMSNormalization"] == {NODE: "rms_norm"}
    ir.save(model, tmp_path / "model.onnx")
    raw = (tmp_path / "model.onnx").read_bytes()
    for trace in (
        b".py",
        b"site-packages",
        str(Path.cwd()).encode(),
        b"pkg.torch",
        b"Traceback",
        str(tmp_path).encode(),
    ):
        assert trace not in raw
    assert onnx.load(tmp_path / "model.onnx", load_external_data=False).producer_name == "edge-export"


def test_lowering_twice_gives_the_same_file(program: Program) -> None:
    def written(make: Callable[[], ir.Model]) -> bytes:
        return ir.to_proto(make()).SerializeToString(deterministic=True)

    recipe = FORMS["standard", "exact"]
    assert written(lambda: lower(program, recipe)) == written(lambda: lower(program, recipe))
