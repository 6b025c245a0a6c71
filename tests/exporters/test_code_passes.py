"""The passes over nodes that compute with codes: what they write multiplies with the same weights."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from exporters.blocks import pack_bits, unpack_bits
from exporters.onnx_weights import read_matrices
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.part_products import part_products
from exporters.passes.set_accuracy_level import set_fast_accuracy
from exporters.passes.split_bytes import split_bytes
from exporters.passes.turn_codes import turn_codes
from exporters.passes.type_codes import type_codes
from exporters.program import Program
from tests.exporters.small_models import FLOAT, RANDOM, layer_program, model_of, operators, run


@pytest.fixture(scope="module")
def program() -> Program:
    return layer_program()


# --- type_codes -----------------------------------------------------------------------------------------------------


def dequantising(bits: int, zeros: bool, gathered: bool = False) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Given of type_codes: 5 rows, 3 blocks of 32; optionally something else reads the codes as bytes too."""
    rows, blocks, block = 5, 3, 32
    weights = {
        "m.codes": RANDOM.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "m.scales": RANDOM.random((rows, blocks), np.float32),
    }
    if zeros:
        weights["m.zeros"] = pack_bits(RANDOM.integers(0, 2**bits, (rows, blocks)).astype(np.uint8), bits)
    nodes = [helper.make_node("DequantizeLinear", list(weights), ["y"], axis=1, block_size=block)]
    outputs: dict[str, list[int | str]] = {"y": [rows, blocks * block]}
    if gathered:
        nodes += [
            helper.make_node("Gather", ["m.codes", "at"], ["row"]),
            helper.make_node("Cast", ["row"], ["z"], to=FLOAT),
        ]
        weights["at"] = np.array([2])
        outputs["z"] = [1, blocks, block * bits // 8]
    return model_of(nodes, {}, outputs, **weights), weights


def append_product(model: ir.Model) -> None:
    """Gives the model the output x [2, 96] @ y.T in the place of the matrix y [5, 96]."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 96]))
    model.graph.inputs.append(x)
    turned = ir.node("Transpose", [model.graph.outputs[0]], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    for node, shape in ((turned, [96, 5]), (product, [2, 5])):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
        model.graph.append(node)
    model.graph.outputs[0] = product.outputs[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_type_codes_keeps_the_bytes(bits: int, zeros: bool, program: Program) -> None:
    model, weights = dequantising(bits, zeros)
    for edit in (type_codes, drop_unused):
        edit(model, Context(program))
    [node] = model.graph
    codes, scales, points = (value.const_value for value in node.inputs)
    wanted = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    assert codes.dtype == points.dtype == wanted
    assert codes.tobytes() == weights["m.codes"].tobytes()
    assert scales.tobytes() == weights["m.scales"].tobytes()
    assert (tuple(codes.shape), tuple(points.shape)) == ((5, 96), (5, 3))
    expected = unpack_bits(weights["m.zeros"], bits, 3).astype(int) if zeros else np.full((5, 3), 2 ** (bits - 1))
    np.testing.assert_array_equal(np.asarray(points.numpy()).astype(np.uint8), expected)
    assert set(model.graph.initializers) == {"m.codes.typed", "m.scales", "m.zeros.typed"}
    # And ONNX Runtime reads them as we do.
    centred = unpack_bits(weights["m.codes"].reshape(5, -1), bits, 96).reshape(5, 3, 32) - expected[..., None]
    np.testing.assert_array_equal(
        run(model), (centred * weights["m.scales"][..., None]).astype(np.float32).reshape(5, 96)
    )


def test_type_codes_leaves_bytes_that_are_read_as_bytes(program: Program) -> None:
    model, weights = dequantising(4, True, gathered=True)
    type_codes(model, Context(program))
    [gather] = [node for node in model.graph if node.op_type == "Gather"]
    assert gather.inputs[0].name == "m.codes" and gather.inputs[0].dtype == ir.DataType.UINT8
    assert gather.inputs[0].const_value.tobytes() == weights["m.codes"].tobytes()


# --- turn_codes -----------------------------------------------------------------------------------------------------


def test_codes_that_are_read_transposed_are_written_so(program: Program) -> None:
    for bits, zeros, gathered in product((4, 8), (True, False), (True, False)):
        model, weights = dequantising(bits, zeros, gathered)
        append_product(model)
        type_codes(model, Context(program))
        x = RANDOM.random((2, 96), np.float32)
        expected = run(model, x=x)
        turn_codes(model, Context(program))
        drop_unused(model)
        [node] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
        assert node.attributes["axis"].as_int() == 0 and "Transpose" not in operators(model)
        assert [tuple(value.const_value.shape) for value in node.inputs] == [(96, 5), (3, 5), (3, 5)]
        np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), weights["m.scales"].T)
        codes = np.asarray(node.inputs[0].const_value.numpy()).astype(np.uint8)
        np.testing.assert_array_equal(codes, unpack_bits(weights["m.codes"].reshape(5, -1), bits, 96).T)
        np.testing.assert_allclose(run(model, x=x), expected, rtol=1e-5)


def test_scales_that_a_lookup_reads_too_are_copied(program: Program) -> None:
    model, weights = dequantising(4, True)
    append_product(model)
    scales = model.graph.initializers["m.scales"]
    model.graph.append(ir.node("Relu", [scales]))
    for edit in (type_codes, turn_codes):
        edit(model, Context(program))
    np.testing.assert_array_equal(scales.const_value.numpy(), weights["m.scales"])
    copy = model.graph.initializers["m.scales.turned"].const_value
    np.testing.assert_array_equal(copy.numpy(), weights["m.scales"].T)


@pytest.mark.parametrize("reader", ["codes", "matrix"])
def test_a_matrix_with_another_reader_is_not_turned(reader: str, program: Program) -> None:
    model, _ = dequantising(4, True)
    append_product(model)
    type_codes(model, Context(program))
    [node] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    model.graph.append(ir.node("Identity", [node.inputs[0] if reader == "codes" else node.outputs[0]]))
    turn_codes(model, Context(program))
    assert node.attributes["axis"].as_int() == 1 and "Transpose" in operators(model)


# --- split_bytes ----------------------------------------------------------------------------------------------------


def multiplied(bits: int, columns: int, zeros: bool) -> ir.Model:
    rows, block = 5, 32
    blocks = -(-columns // block)
    weights = {
        "m.codes": RANDOM.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "m.scales": RANDOM.random((rows, blocks), np.float32),
    }
    if zeros:
        weights["m.zeros"] = RANDOM.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=block, accuracy_level=1,
    )  # fmt: skip
    return model_of([node], {"x": [2, columns]}, {"y": [2, rows]}, **weights)


@pytest.mark.parametrize("zeros", [True, False])
def test_split_bytes_multiplies_with_the_same_weights(zeros: bool, program: Program, tmp_path: Path) -> None:
    model = multiplied(8, 96, zeros)
    x = RANDOM.standard_normal((2, 96)).astype(np.float32)
    before = run(model, x=x)
    ir.save(model, tmp_path / "before.onnx")
    split_bytes(model, Context(program))
    ir.save(model, tmp_path / "after.onnx")
    assert operators(model) == ["Concat", "MatMulNBits"]
    np.testing.assert_allclose(run(model, x=x), before, rtol=1e-5, atol=1e-5)
    stored, read = (read_matrices(tmp_path / name)["m"] for name in ("before.onnx", "after.onnx"))
    assert (read.bits, read.block) == (8, 32)
    np.testing.assert_array_equal(read.codes, stored.codes)
    np.testing.assert_array_equal(read.scales, stored.scales)
    np.testing.assert_array_equal(
        read.zero_points, np.full((5, 3), 128) if stored.zero_points is None else stored.zero_points
    )


@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (8, 90)], ids=["4 bits", "a padded block"])
def test_split_bytes_leaves_other_products(bits: int, columns: int, program: Program) -> None:
    model = multiplied(bits, columns, True)
    split_bytes(model, Context(program))
    assert operators(model) == ["MatMulNBits"]
    assert model.graph[0].attributes["bits"].as_int() == bits


# --- part_products --------------------------------------------------------------------------------------------------


def cut(bits: int, zeros: bool, parts: int, axis: int = -1) -> ir.Model:
    """A product of 12 rows whose result [2, 12] is cut along its last axis, each part through a Relu."""
    weights = {
        "m.codes": RANDOM.integers(0, 256, (12, 3, 4 * bits), np.uint8),
        "m.scales": RANDOM.random((12, 3), np.float32),
        "m.zeros": RANDOM.integers(0, 256, (12, -(-3 * bits // 8)), np.uint8),
        "m.bias": RANDOM.random(12, np.float32),
    }
    inputs = ["x", "m.codes", "m.scales", "m.zeros" if zeros else "", "", "m.bias"]
    nodes = [
        helper.make_node(
            "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=96, N=12, bits=bits, block_size=32, accuracy_level=1
        ),
        helper.make_node("Split", ["y"], [f"y{i}" for i in range(parts)], axis=axis, num_outputs=parts),
        *(helper.make_node("Relu", [f"y{i}"], [f"z{i}"]) for i in range(parts)),
    ]
    if not zeros:
        del weights["m.zeros"]
    return model_of(nodes, {"x": [2, 96]}, {f"z{i}": [2, 12 // parts] for i in range(parts)}, **weights)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_result_that_is_cut_is_a_product_for_each_part(
    bits: int, zeros: bool, parts: int, program: Program, tmp_path: Path
) -> None:
    model = cut(bits, zeros, parts)
    x = RANDOM.standard_normal((2, 96)).astype(np.float32)
    before = [run(model, output=i, x=x) for i in range(parts)]
    ir.save(model, tmp_path / "before.onnx")
    for edit in (part_products, drop_unused):
        edit(model, Context(program))
    ir.save(model, tmp_path / "after.onnx")
    assert Counter(operators(model)) == {"MatMulNBits": parts, "Relu": parts}
    for i, expected in enumerate(before):
        np.testing.assert_allclose(run(model, output=i, x=x), expected, rtol=1e-5, atol=1e-5)
    stored, read = (read_matrices(tmp_path / name)["m"] for name in ("before.onnx", "after.onnx"))
    assert (read.bits, read.block) == (bits, 32)
    for part in ("codes", "scales", *(["zero_points"] if zeros else [])):
        np.testing.assert_array_equal(getattr(read, part), getattr(stored, part))
    assert zeros or read.zero_points is None


def test_a_part_that_is_missing_is_no_whole_matrix(program: Program, tmp_path: Path) -> None:
    model = cut(4, True, 3)
    part_products(model, Context(program))
    model.graph.outputs.pop()
    model.graph.remove([model.graph[5], model.graph[2]], safe=True)
    ir.save(model, tmp_path / "model.onnx")
    assert read_matrices(tmp_path / "model.onnx")["m"].codes.shape[0] == 8


def test_a_result_that_is_cut_otherwise_stays_whole(program: Program) -> None:
    whole = cut(4, True, 2, axis=0)
    read_twice = cut(4, True, 2)
    read_twice.graph.append(ir.node("Relu", [read_twice.graph[0].outputs[0]]))
    for model in (whole, read_twice):
        part_products(model, Context(program))
        assert operators(model)[:2] == ["MatMulNBits", "Split"]


# --- set_accuracy_level ---------------------------------------------------------------------------------------------


def test_set_accuracy_level_touches_the_quantised_products_alone(program: Program) -> None:
    model = multiplied(4, 96, True)
    model.graph.append(ir.node("Relu", [model.graph[0].outputs[0]]))
    set_fast_accuracy(model, Context(program))
    assert model.graph[0].attributes["accuracy_level"].as_int() == 4
    assert not model.graph[1].attributes
