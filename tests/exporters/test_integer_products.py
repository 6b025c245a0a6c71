"""Products of rounded inputs with 8-bit matrices on ONNX Runtime: the reference's codes, and exact sums of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from exporters import ops
from exporters.activations import Activation
from exporters.external_data import WeightFile
from exporters.onnx_ import FORMS, lower
from exporters.onnx_weights import read_matrices
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec

ROWS, BLOCK = 7, 32
ACTIVATIONS: Mapping[str, Activation] = {
    "token": Activation("int8"),
    "token-zeros": Activation("int8", symmetric=False),
    "static": Activation("int8", scale=float(np.float32(0.037))),
    "static-zeros": Activation("int8", symmetric=False, scale=float(np.float32(0.037)), zero_point=-7),
}


class Layer(torch.nn.Module):
    """A rounded input, which two matrices read and, where it is ``seen``, an output shows."""

    def __init__(self, activation: Activation, columns: int, zeros: bool, seen: bool, mixed: bool = False) -> None:
        super().__init__()
        random = np.random.default_rng(columns + zeros)
        blocks = -(-columns // BLOCK)
        self.activation, self.columns, self.seen = activation, columns, seen
        for name in ("first", "second"):
            codes = random.integers(0, 256, (ROWS, blocks, BLOCK), np.uint8)
            codes[0], codes[1] = 255, 0  # whose products reach furthest
            scales = np.repeat(random.uniform(0.001, 0.1, (ROWS, 1)).astype(np.float32), blocks, 1)
            if mixed and name == "second":
                scales[:, -1] *= 2
            self.register_buffer(f"{name}_codes", torch.from_numpy(codes))
            self.register_buffer(f"{name}_scales", torch.from_numpy(scales))
            if zeros:
                points = np.repeat(random.integers(0, 256, (ROWS, 1), np.uint8), blocks, 1)
                self.register_buffer(f"{name}_zeros", torch.from_numpy(points))
            else:
                setattr(self, f"{name}_zeros", None)
        self.register_buffer("bias", torch.linspace(-3, 3, ROWS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        held = self.activation(x)
        found = [
            ops.quantized_linear(
                held, getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales"), getattr(self, f"{name}_zeros"),
                bias, 8, self.columns,
            )
            for name, bias in (("first", self.bias), ("second", None))
        ]  # fmt: skip
        return (*found, held * 1) if self.seen else tuple(found)


def inputs(length: int, columns: int) -> np.ndarray:
    """Rows from small to large: one on the static scale's ties and past its range, one of equal values, one of none."""
    random = np.random.default_rng(length)
    x = random.standard_normal((1, length, columns)).astype(np.float32) * np.logspace(-2, 1, length)[None, :, None]
    x[0, 0, :8] = np.float32([0.5, 1.5, -0.5, -2.5, 150, -200, 0, 3.5]) * np.float32(0.037)
    if length > 2:
        x[0, 1], x[0, 2] = 1.0, 0.0
    return x.astype(np.float32)


def captured(layer: Layer) -> Program:
    specs = [TensorSpec(name, "float32", (1, "S", width)) for name, width in (("a", ROWS), ("b", ROWS))]
    specs += [TensorSpec("held", "float32", (1, "S", layer.columns))] * layer.seen
    examples = (torch.zeros(1, 3, layer.columns),)
    return capture("lm", layer, examples, {"x": {1: "S"}}, tuple(specs), ("x",))


def written(layer: Layer, folder: Path, mode: str = "exact") -> ir.Model:
    model = lower(captured(layer), FORMS["fused", mode])
    with WeightFile(folder / "op.data") as weights:
        weights.adopt(model)
    ir.save(model, folder / "op.onnx")
    return model


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "op.onnx", options, providers=["CPUExecutionProvider"])


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def expected(layer: Layer, name: str, x: np.ndarray) -> np.ndarray:
    """The product in float64, from the codes that the reference rounds the input to."""
    rounded = layer.activation.reference(torch.from_numpy(x)).double().numpy()
    step = np.float64(layer.activation.scale) if layer.activation.scale else _step(x, layer.activation.symmetric)
    held = np.rint(rounded / step) * step
    np.testing.assert_allclose(held, rounded, rtol=2**-23)
    codes = getattr(layer, f"{name}_codes").numpy().reshape(ROWS, -1)[:, : layer.columns].astype(float)
    zeros = getattr(layer, f"{name}_zeros")
    points = 128.0 if zeros is None else zeros.numpy()[:, :1].astype(float)
    scales = np.repeat(getattr(layer, f"{name}_scales").numpy(), BLOCK, 1)[:, : layer.columns].astype(float)
    return held @ ((codes - points) * scales).T


def _step(x: np.ndarray, symmetric: bool) -> np.ndarray:
    """Each row's own scale, in float32 as the reference has it."""
    least, most = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = np.maximum(-least, most) / np.float32(127.5) if symmetric else (most - least) / np.float32(255)
    return np.where(step == 0, np.float32(2**-23), step).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "zeros", "columns"),
    [
        ("token", False, 64),
        ("token", True, 50),
        ("token-zeros", True, 50),
        ("static", False, 50),
        ("static-zeros", True, 64),
    ],
)
def test_codes_are_the_references_and_sums_are_exact(name: str, zeros: bool, columns: int, tmp_path: Path) -> None:
    layer = Layer(ACTIVATIONS[name], columns, zeros, seen=True)
    model = written(layer, tmp_path)
    product = "MatMulInteger" if name == "token-zeros" else "MatMulIntegerToFloat"
    assert operators(model).isdisjoint({"MatMulNBits"}) and product in operators(model)
    assert {node.domain for node in model.graph} <= {"", "com.microsoft"}
    found = session(tmp_path)
    for length in (1, 5):
        x = inputs(length, columns)
        first, second, held = found.run(None, {"x": x})
        np.testing.assert_array_equal(held, layer.activation.reference(torch.from_numpy(x)).numpy())
        for matrix, got in (("first", first - layer.bias.numpy()), ("second", second)):
            wanted = expected(layer, matrix, x)
            # What the scales are multiplied with is exact, so the error is a few roundings of each result alone.
            allowed = 4 * 2.0**-24 * (np.abs(wanted) + (np.abs(first) + 3 if matrix == "first" else 0))
            assert (np.abs(got - wanted) <= allowed).all(), matrix
    weights = read_matrices(tmp_path / "op.onnx")
    assert len(weights) == 2
    for matrix in ("first", "second"):
        [stored] = [value for key, value in weights.items() if key.startswith(matrix)]
        codes, scales, points = (getattr(layer, f"{matrix}_{part}") for part in ("codes", "scales", "zeros"))
        np.testing.assert_array_equal(stored.codes, codes.numpy().reshape(ROWS, -1)[:, :columns])
        np.testing.assert_array_equal(stored.scales, scales.numpy()[:, :1])
        assert (stored.zero_points is None) == (not zeros)
        if zeros:
            np.testing.assert_array_equal(stored.zero_points, points.numpy()[:, :1])


@pytest.mark.parametrize("name", ["token", "static-zeros"])
def test_a_matrix_with_several_scales_a_row_takes_the_rounded_values(name: str, tmp_path: Path) -> None:
    layer = Layer(ACTIVATIONS[name], 64, False, seen=False, mixed=True)
    assert {"MatMulNBits"} < operators(written(layer, tmp_path))
    x = inputs(5, 64)
    for matrix, got in zip(("first", "second"), session(tmp_path).run(None, {"x": x}), strict=True):
        wanted = expected(layer, matrix, x) + (layer.bias.numpy() if matrix == "first" else 0)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_fast_form_does_not_round_again(tmp_path: Path) -> None:
    layer = Layer(ACTIVATIONS["token"], 64, False, seen=False)
    for mode in ("exact", "fast"):
        (tmp_path / mode).mkdir()
        written(layer, tmp_path / mode, mode)
    results = [session(tmp_path / mode).run(None, {"x": inputs(5, 64)}) for mode in ("exact", "fast")]
    for exact, fast in zip(*results, strict=True):
        np.testing.assert_array_equal(exact, fast)
