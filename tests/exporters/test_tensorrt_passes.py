"""What TensorRT's model passes make of small models: the same numbers, in the operators that its parser takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from exporters import ops
from exporters.blocks import pack_bits
from exporters.ops.tensorrt import BUILD, EDGE
from exporters.passes.attach_head import CANDIDATES, IDS, ROWS, TILE, VALUES
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.mark_origins import MODULE
from exporters.passes.name_nodes import name_nodes
from exporters.passes.pack_words import pack_words
from exporters.passes.quantise_convolutions import quantise_convolutions
from exporters.passes.spell_lookups import spell_lookups
from exporters.passes.spell_products import CODES, OFFSETS, SCALES, spell_products
from exporters.passes.words import to_words
from exporters.program import capture
from exporters.tensorrt_ import lower
from exporters.tensorrt_generations import GENERATIONS
from runtimes.bundle import TensorSpec
from tests.exporters.op_cases import dequantised, rms_norm

Array = np.ndarray[Any, Any]
FLOAT, HALF, INT32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32
OLDEST = GENERATIONS[-1]
FLOAT_TYPES = [np.float32, np.float16]


@pytest.fixture(scope="module")
def context() -> Context:
    """The passes here ask nothing of the program but its name."""
    program = capture("lm", torch.nn.ReLU(), (torch.rand(2, 3),), {}, (TensorSpec("y", "float32", (2, 3)),), ("x",))
    return Context(program)


def value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def model_of(nodes: list[ir.Node], inputs: list[ir.Value], weights: dict[str, ir.Value], opset: int = 21) -> ir.Model:
    """A model whose outputs are those of its last node."""
    graph = ir.Graph(
        inputs, list(nodes[-1].outputs), nodes=nodes, initializers=list(weights.values()),
        opset_imports={"": opset, BUILD: 1, EDGE: 1}, name="g",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def initializers(arrays: dict[str, Array | None]) -> dict[str, ir.Value]:
    found = {}
    for name, array in arrays.items():
        if array is not None:
            tensor = ir.Tensor(array, name=name)
            found[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
    return found


def run(model: ir.Model, **feeds: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def held(model: ir.Model, name: str) -> Array:
    return np.asarray(model.graph.initializers[name].const_value.numpy())


def near(got: Array, expected: Array, tolerance: float) -> bool:
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


def matrix(bits: int, block: int, zeros: bool, rows: int, columns: int, scale: type = np.float32) -> dict[str, Any]:
    """Random codes, scales and zero points that use every value, in the layout of quantized_linear."""
    random, blocks = np.random.default_rng(bits + block + columns), -(-columns // block)
    return {
        "codes": random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "scales": random.uniform(0.01, 0.1, (rows, blocks)).astype(scale),
        "zeros": random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None,
    }


def built(
    op_type: str, parts: dict[str, Any], bits: int, columns: int, dtype: ir.DataType, given: ir.Value
) -> ir.Model:
    """One node of the build's own domain on a matrix."""
    weights = initializers({f"m.{name}": part for name, part in parts.items()})
    attributes = {"bits": bits, "columns": columns}
    node = ir.node(op_type, [given, *weights.values()], attributes, domain=BUILD)
    rows = columns if op_type == "Lookup" else len(parts["codes"])
    node.outputs[0].name, node.outputs[0].dtype = "y", dtype
    node.outputs[0].shape = ir.Shape([*given.shape[:2], rows])
    return model_of([node], [given], weights)


# --- spell_products -------------------------------------------------------------------------------------------------


def product(parts: dict[str, Any], bits: int, columns: int, x: type = np.float32) -> ir.Model:
    dtype = ir.DataType.from_numpy(np.dtype(x))
    return built("Product", parts, bits, columns, dtype, value("x", dtype, [1, "S", columns]))


@pytest.mark.parametrize(("bits", "block", "zeros", "columns"), [
    (4, 32, True, 96), (4, 32, False, 96), (4, 16, True, 41), (4, 128, False, 130), (8, 32, True, 70),
    (8, 16, False, 37),
])  # fmt: skip
def test_spell_products_is_exact(bits: int, block: int, zeros: bool, columns: int, context: Context) -> None:
    parts = matrix(bits, block, zeros, 7, columns)
    model = product(parts, bits, columns)
    spell_products(model, context)
    drop_unused(model)
    counts = operators(model)
    assert "Product" not in counts and counts.count("DequantizeLinear") == 1
    assert counts.count("MatMul") == 1 + zeros and ("Pad" in counts) == (columns % block > 0)
    # The student's numbers, moved by whole steps and never rounded.
    blocks = -(-columns // block)
    wide = dequantised(parts["codes"], np.ones((7, blocks)), None, bits, blocks * block)
    np.testing.assert_array_equal(held(model, f"m{CODES}").astype(int).T, wide)
    assert model.graph.initializers[f"m{CODES}"].dtype == {4: ir.DataType.INT4, 8: ir.DataType.INT8}[bits]
    assert held(model, f"m{SCALES}").tobytes() == np.ascontiguousarray(parts["scales"].T).tobytes()
    names = {f"m{CODES}", f"m{SCALES}"} | ({f"m{OFFSETS}"} if zeros else set())
    assert {name for name in model.graph.initializers if name.startswith("m.")} == names
    x = np.random.default_rng(1).standard_normal((1, 5, columns)).astype(np.float32)
    expected = x.astype(float) @ dequantised(**parts, bits=bits, columns=columns).T
    assert near(run(model, x=x)[0], expected, 3e-6)


def test_spell_products_finds_a_zero_point_that_lies_far_off(context: Context) -> None:
    """All codes 0 with zero point 15: what the signed codes hold alone is less than half of the weight."""
    parts = {"codes": np.zeros((3, 2, 16), np.uint8), "scales": np.ones((3, 2), np.float32)}
    parts["zeros"] = pack_bits(np.full((3, 2), 15, np.uint8), 4)
    model = product(parts, 4, 64)
    spell_products(model, context)
    np.testing.assert_array_equal(run(model, x=np.ones((1, 1, 64), np.float32))[0], np.full((1, 1, 3), -15.0 * 64))
    np.testing.assert_array_equal(held(model, f"m{OFFSETS}"), np.full((2, 3), -7.0))


def test_spell_products_writes_one_scale_a_row_per_channel(context: Context) -> None:
    """A per-channel scale that stands there once for each block; the codes behind the last column are dropped."""
    parts = matrix(8, 32, False, 5, 70)
    parts["scales"] = np.repeat(parts["scales"][:, :1], 3, 1)
    model = product(parts, 8, 70)
    spell_products(model, context)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    assert "block_size" not in model.graph[0].attributes and model.graph[0].attributes["axis"].as_int() == 1
    assert held(model, f"m{CODES}").shape == (70, 5) and held(model, f"m{SCALES}").shape == (5,)
    x = np.random.default_rng(2).standard_normal((1, 3, 70)).astype(np.float32)
    assert near(run(model, x=x)[0], x.astype(float) @ dequantised(**parts, bits=8, columns=70).T, 3e-6)


def test_spell_products_keeps_blocks_where_one_scale_differs(context: Context) -> None:
    parts = matrix(8, 32, False, 5, 64)
    parts["scales"] = np.repeat(parts["scales"][:, :1], 2, 1)
    parts["scales"][3, 1] *= np.float32(1.0001)
    model = product(parts, 8, 64)
    spell_products(model, context)
    assert model.graph[0].attributes["block_size"].as_int() == 32
    assert held(model, f"m{SCALES}").shape == (2, 5)


@pytest.mark.parametrize("zeros", [True, False])
def test_spell_products_keeps_scales_that_float16_does_not_hold(zeros: bool, context: Context) -> None:
    parts = matrix(4, 32, zeros, 7, 64)
    assert not np.array_equal(parts["scales"].astype(np.float16).astype(np.float32), parts["scales"])
    model = product(parts, 4, 64, np.float16)
    spell_products(model, context)
    assert held(model, f"m{SCALES}").dtype == np.float32
    dequantise, cast = list(model.graph)[:2]
    assert (dequantise.outputs[0].dtype, cast.op_type, cast.outputs[0].dtype) == (FLOAT, "Cast", HALF)
    x = np.random.default_rng(3).standard_normal((1, 4, 64)).astype(np.float16)
    [got] = run(model, x=x)
    assert got.dtype == np.float16
    assert near(got.astype(float), x.astype(float) @ dequantised(**parts, bits=4, columns=64).T, 3e-3)


def test_spell_products_keeps_float16_scales_without_a_cast(context: Context) -> None:
    model = product(matrix(4, 32, False, 7, 64, np.float16), 4, 64, np.float16)
    spell_products(model, context)
    assert operators(model) == ["DequantizeLinear", "MatMul"]


# --- spell_lookups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "block", "zeros", "columns"), [
    (4, 32, True, 96), (4, 32, False, 41), (8, 32, True, 70), (8, 128, False, 130), (8, 66, True, 66),
    (4, 18, True, 18),
])  # fmt: skip
@pytest.mark.parametrize("scale", FLOAT_TYPES)
def test_spell_lookups_reads_every_code(
    bits: int, block: int, zeros: bool, columns: int, scale: type, context: Context
) -> None:
    """Rows of 9, 18 or 66 bytes end within a word; half of all words are negative."""
    parts = matrix(bits, block, zeros, 13, columns, scale)
    model = built("Lookup", parts, bits, columns, FLOAT, value("ids", INT32, [1, "S"]))
    spell_lookups(model, context)
    drop_unused(model)
    assert (held(model, "m.codes.words") < 0).any() and (held(model, "m.codes.words") > 0).any()
    assert not {"BitShift", "BitwiseAnd", "Lookup"} & set(operators(model))
    names = {"m.codes.words", "m.scales"} | ({"m.zeros.words"} if zeros else set())
    assert {name for name in model.graph.initializers if name.startswith("m.")} == names
    [got] = run(model, ids=np.arange(13, dtype=np.int32)[None])
    np.testing.assert_array_equal(got[0], dequantised(**parts, bits=bits, columns=columns).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_spell_lookups_reads_words_of_ones_and_of_the_sign_alone(bits: int, context: Context) -> None:
    codes = np.array([[[255, 255, 255, 255]], [[0, 0, 0, 128]], [[0, 0, 0, 0]], [[255, 255, 255, 127]]], np.uint8)
    parts = {"codes": codes, "scales": np.ones((4, 1), np.float32), "zeros": None}
    columns = 32 // bits
    model = built("Lookup", parts, bits, columns, FLOAT, value("ids", INT32, [1, "S"]))
    spell_lookups(model, context)
    [got] = run(model, ids=np.array([[0, 1, 2, 3]], np.int32))
    np.testing.assert_array_equal(got[0], dequantised(**parts, bits=bits, columns=columns))


# --- pack_words -----------------------------------------------------------------------------------------------------


def kernel(name: str, parts: dict[str, Any], bits: int, bias: Array | None, domain: str = EDGE) -> ir.Model:
    columns = 64
    weights = initializers({"norm": np.ones(columns, np.float16)} | {f"m.{k}": v for k, v in parts.items()})
    ordered = [weights.get(f"m.{part}") for part in ("codes", "scales", "zeros")]
    if bias is not None:
        weights |= initializers({"bias": bias})
    inputs = [value("x", HALF, [1, "S", columns]), weights["norm"], *ordered, weights.get("bias")]
    while inputs[-1] is None:
        inputs.pop()
    if name == "EdgeHead":
        inputs = [*inputs[:2], *ordered, value(ROWS, INT32, [2])]
    node = ir.node(name, inputs, {"bits": bits}, domain=domain)
    given = [each for each in inputs if each is not None and not each.is_initializer() and each.name in ("x", ROWS)]
    return model_of([node], given, weights)


@pytest.mark.parametrize(("bits", "blocks"), [(4, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_pack_words_keeps_the_bytes_and_leaves_no_input_out(
    bits: int, blocks: int, zeros: bool, biased: bool, context: Context
) -> None:
    parts = matrix(bits, 64 // blocks, zeros, 5, 64, np.float16)
    bias = np.arange(5, dtype=np.float16) if biased else None
    model = kernel("EdgeNormLinear", parts, bits, bias)
    pack_words(model, context)
    x, norm, codes, scales, points, added = model.graph[0].inputs
    assert [each.name for each in (x, norm, scales)] == ["x", "norm", "m.scales"]
    assert codes.dtype == points.dtype == INT32 and added.dtype == HALF
    assert codes.const_value.tobytes() == parts["codes"].tobytes()
    size = -(-blocks * bits // 8)
    raw = points.const_value.numpy().view(np.uint8)
    assert raw.shape[1] % 4 == 0
    packed = parts["zeros"] if zeros else pack_bits(np.full((5, blocks), 2 ** (bits - 1), np.uint8), bits)
    np.testing.assert_array_equal(raw[:, :size], packed)
    assert not raw[:, size:].any()
    np.testing.assert_array_equal(added.const_value.numpy(), np.zeros(5) if bias is None else bias)


def test_pack_words_gives_the_head_no_bias(context: Context) -> None:
    model = kernel("EdgeHead", matrix(4, 32, False, 5, 64, np.float16), 4, None)
    pack_words(model, context)
    assert [each.name for each in model.graph[0].inputs] == [
        "x", "norm", "m.codes.words", "m.scales", "m.zeros.words", ROWS,
    ]  # fmt: skip


def test_pack_words_leaves_nodes_of_other_domains(context: Context) -> None:
    model = kernel("EdgeNormLinear", matrix(4, 32, False, 5, 64, np.float16), 4, None, domain="other")
    pack_words(model, context)
    assert len(model.graph[0].inputs) == 4 and model.graph[0].inputs[2].name == "m.codes"


def test_words_are_little_endian_and_padded_with_zeros() -> None:
    words = to_words(np.array([[1, 2, 3, 4, 5], [0, 0, 0, 128, 255]], np.uint8))
    np.testing.assert_array_equal(words, [[0x04030201, 5], [-(2**31), 255]])


# --- attach_head ----------------------------------------------------------------------------------------------------

VOCABULARY, HIDDEN = 600, 64


class Head(torch.nn.Module):
    """The end of a language model: the newest row's norm and product."""

    def __init__(self, bias: bool = False, behind: Callable[[Any], Any] = lambda y: y) -> None:
        super().__init__()
        parts = matrix(4, 32, True, VOCABULARY, HIDDEN, np.float16)
        self.behind = behind
        for name, part in parts.items():
            self.register_buffer(name, torch.from_numpy(part))
        self.scales = self.scales.float()
        self.register_buffer("norm", torch.linspace(0.5, 2, HIDDEN))
        self.register_buffer("bias", torch.linspace(-1, 1, VOCABULARY) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = ops.rms_norm(x, self.norm, 1e-5)[:, -1:]
        y = ops.quantized_linear(row, self.codes, self.scales, self.zeros, self.bias, 4, HIDDEN)
        return self.behind(y)[:, -1]


def head(**options: Any) -> tuple[ir.Model, Head]:
    module = Head(**options)
    spec = (TensorSpec("logits", "float32", (1, VOCABULARY)),)
    program = capture("lm", module, (torch.rand(1, 3, HIDDEN),), {"x": {1: "S"}}, spec, ("x",))
    return lower(program, ("fused", "fp16"), OLDEST)[1], module


def test_attach_head_adds_the_rows_and_the_candidates() -> None:
    model, module = head()
    graph = model.graph
    assert [each.name for each in graph.inputs] == ["x", ROWS]
    assert [(each.name, each.dtype) for each in graph.outputs] == [("logits", FLOAT), (VALUES, FLOAT), (IDS, INT32)]
    names = [node.name for node in graph]
    assert len(set(names)) == len(names) and all("/" in (name or "") for name in names)
    counts = operators(model)
    assert counts.count("EdgeHead") == counts.count("EdgeMergeTop") == 1 and "EdgeNormLinear" not in counts
    assert list(graph.outputs[1].shape) == [1, CANDIDATES]
    x = np.random.default_rng(0).standard_normal((1, 4, HIDDEN)).astype(np.float32)
    [row] = rms_norm(x[:, -1].astype(np.float16), module.norm.numpy(), 1e-5)
    weights = dequantised(module.codes.numpy(), module.scales.numpy(), module.zeros.numpy(), 4, HIDDEN)
    expected = row @ weights.T
    # Within a tile, across tiles, the last tile's tail, and fewer rows than candidates.
    for first, end in ((0, VOCABULARY), (3, 200), (100, 520), (510, VOCABULARY), (256, 512), (7, 12)):
        logits, values, ids = run(model, x=x, rows=np.array([first, end], np.int32))
        inside = np.arange(VOCABULARY)
        inside = (inside >= first) & (inside < end)
        assert (logits[0, ~inside] == -np.inf).all()
        assert near(logits[0, inside], expected[0, inside], 3e-3)
        count = min(CANDIDATES, end - first)
        order = np.argsort(-logits[0], kind="stable")[:count]
        np.testing.assert_array_equal(ids[0, :count], order)
        np.testing.assert_array_equal(values[0, :count], logits[0, order])
        assert (values[0, count:] == -np.inf).all() and (ids[0, count:] == -1).all()
    assert VOCABULARY % TILE


@pytest.mark.parametrize(
    "options",
    [dict(bias=True), dict(behind=lambda y: 30 * torch.tanh(y / 30))],
    ids=["a bias", "a soft cap"],
)
def test_attach_head_leaves_other_heads(options: dict[str, Any]) -> None:
    model, _ = head(**options)
    assert [each.name for each in model.graph.inputs] == ["x"]
    assert [each.name for each in model.graph.outputs] == ["logits"]
    assert operators(model).count("EdgeNormLinear") == 1 and "EdgeHead" not in operators(model)


# --- quantise_convolutions ------------------------------------------------------------------------------------------


def convolutions(dtype: type = np.float32) -> ir.Model:
    """Two convolutions in a row, then one that upsamples; the first has a channel of zeros."""
    random = np.random.default_rng(4)
    arrays = {name: random.standard_normal((6, 6, 3)).astype(dtype) for name in ("v", "w", "u")}
    arrays["v"][2] = 0
    weights = initializers(arrays | {"b": np.arange(6).astype(dtype)})
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    x = value("x", kind, ["B", 6, "T"])
    first = ir.node("Conv", [x, weights["v"], weights["b"]], {"pads": [1, 1]}, name="first")
    second = ir.node("Conv", [first.outputs[0], weights["w"]], {"pads": [1, 1]}, name="second")
    third = ir.node("ConvTranspose", [second.outputs[0], weights["u"]], {"pads": [1, 1]}, name="third")
    for node, name in ((first, "a"), (second, "c"), (third, "y")):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, kind, ir.Shape(["B", 6, "T"])
    return model_of([first, second, third], [x], weights)


def convolved(x: Array, weight: Array) -> Array:
    """A convolution of width 3 with a border of zeros, in float64."""
    wide = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, 3, 2)
    return np.einsum("bitk,oik->bot", windows, weight.astype(float))


def quantised(values: Array, scale: Array | float) -> Array:
    return np.clip(np.rint(values / scale), -127, 127) * scale


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_quantise_convolutions_rounds_input_and_weight_of_those_named(dtype: type) -> None:
    model = convolutions(dtype)
    v, w = (held(model, name) for name in ("v", "w"))
    quantise_convolutions(model, {"first": 3.0, "third": 9.0})
    drop_unused(model)
    assert operators(model) == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "Conv", "ConvTranspose",
    ]  # fmt: skip
    scales = held(model, "v.scales")
    assert scales.dtype == dtype and scales[2] == 1
    np.testing.assert_allclose(np.delete(scales, 2), np.delete(np.abs(v).max((1, 2)), 2) / 127, rtol=1e-3)
    assert held(model, "v.int8").dtype == np.int8 and np.abs(held(model, "v.int8").astype(int)).max() == 127
    np.testing.assert_array_equal(held(model, "w"), w)
    x = np.random.default_rng(5).uniform(-3, 3, (2, 6, 9)).astype(dtype)
    model.graph.outputs[:] = [next(node for node in model.graph if node.name == "first").outputs[0]]
    [got] = run(model, x=x)
    step = float(dtype(3.0 / 127))
    rounded = quantised(v.astype(float), scales.astype(float)[:, None, None])
    expected = convolved(quantised(x.astype(float), step), rounded) + np.arange(6)[:, None]
    assert near(got.astype(float), expected, 1e-5 if dtype is np.float32 else 3e-3)
    assert not near(got.astype(float), convolved(x, v) + np.arange(6)[:, None], 1e-4)


def test_quantise_convolutions_without_ranges_changes_nothing() -> None:
    model = convolutions()
    quantise_convolutions(model, {})
    assert operators(model) == ["Conv", "Conv", "ConvTranspose"]


# --- name_nodes -----------------------------------------------------------------------------------------------------


def test_name_nodes_counts_within_a_module(context: Context) -> None:
    x = value("x", FLOAT, [2])
    nodes: list[ir.Node] = []
    for module, op_type in (("a.b", "Relu"), ("a.b", "Relu"), ("a.b", "Neg"), ("a.c", "Relu"), (None, "Relu")):
        metadata = {} if module is None else {MODULE: module}
        nodes.append(ir.node(op_type, [nodes[-1].outputs[0] if nodes else x], metadata_props=metadata, name="same"))
    model = model_of(nodes, [x], {})
    name_nodes(model, context)
    assert [node.name for node in model.graph] == ["a.b/Relu", "a.b/Relu_2", "a.b/Neg", "a.c/Relu", "lm/Relu"]
