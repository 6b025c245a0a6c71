"""Small ONNX models for the tests of passes, and a small Program for what passes are handed with them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters import ops
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec

FLOAT = TensorProto.FLOAT
RANDOM = np.random.default_rng(0)


@functools.cache
def layer_program() -> Program:
    """A quantised layer and a norm, captured: what a Context holds."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.from_numpy(RANDOM.integers(0, 256, (7, 3, 16), np.uint8)))
            self.register_buffer("scales", torch.rand(7, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.quantized_linear(x, self.codes, self.scales, None, None, 4, 96)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()
            self.register_buffer("norm", torch.ones(96))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(ops.rms_norm(x, self.norm, 1e-5))

    spec = (TensorSpec("y", "float32", (1, "S", 7)),)
    return capture("lm", Model(), (torch.rand(1, 3, 96),), {"x": {1: "S"}}, spec, ("x",))


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]],
    **weights: np.ndarray,
) -> ir.Model:  # fmt: skip
    """An onnx_ir model; inputs and outputs are float."""
    infos = [
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", *infos, tensors)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, output: int = 0, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)[output]
