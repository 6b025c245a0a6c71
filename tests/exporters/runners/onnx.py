"""The ops through the ONNX exporter's two exact forms, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from exporters.external_data import WeightFile
from exporters.onnx_ import FORMS, Form, lower
from exporters.program import Program
from tests.exporters.op_cases import KERNELS_ONLY, Array, Case
from tests.exporters.runners import Runner, Step

#: target -> op -> operator
OPERATORS = {
    "onnx/fused": {
        "add_rms_norm": "SkipSimplifiedLayerNormalization",
        "bias_snake": "",
        "codebook_lookup": "Gather",
        "group_norm_silu": "",
        "kv_attention": "GroupQueryAttention",
        "projection": "MatMulNBits",
        "quantize_activation": "",
        "quantized_embedding": "Gather",
        "quantized_linear": "MatMulNBits",
        "rms_norm": "RMSNormalization",
        "rope_angles": "",
        "snake": "",
        "swiglu": "QuickGelu",
        "table_embedding": "Gather",
        "table_linear": "",  # by its encoding, see TABLES
    },
    "onnx/standard": {
        "add_rms_norm": "RMSNormalization",
        "bias_snake": "",
        "codebook_lookup": "Gather",
        "group_norm_silu": "",
        "kv_attention": "Attention",
        "projection": "DequantizeLinear",
        "quantize_activation": "",
        "quantized_embedding": "Gather",
        "quantized_linear": "DequantizeLinear",
        "rms_norm": "RMSNormalization",
        "rope_angles": "",
        "snake": "",
        "swiglu": "",
        "table_embedding": "Gather",
        "table_linear": "",
    },
}
#: target -> encoding -> operator
TABLES = {
    "onnx/fused": {
        "float4_e2m1fn": "MatMulNBits",
        "float8_e4m3fn": "DequantizeLinear",
        "float8_e5m2": "DequantizeLinear",
        "nf4": "MatMulBnb4",
    },
    "onnx/standard": {
        "float4_e2m1fn": "Gather",
        "float8_e4m3fn": "DequantizeLinear",
        "float8_e5m2": "DequantizeLinear",
        "nf4": "Gather",
    },
}
TOLERANCE = {"exact": 0.0, "float32": 3e-6, "float16": 3e-3, "code": 3e-6}
#: Attention-24 multiplies masked slots by 0, so they have to be finite: sessions start from zeros.
FILLER = {"onnx/fused": float("nan"), "onnx/standard": 50.0}


def build(recipe: Form, case: Case, program: Program, folder: Path) -> Step:
    """The op lowered by ``recipe``, written with external data and run by ONNX Runtime."""
    model = lower(program, recipe)
    with WeightFile(folder / "op.data") as weights:
        weights.adopt(model)
    ir.save(model, folder / "op.onnx")
    operators = {node.op_type for node in model.graph.all_nodes()}
    lowered = OPERATORS[recipe.target][case.op]
    if case.op == "table_linear":
        whole = case.fixed["columns"] % case.fixed["codes"].shape[1] == 0
        lowered = TABLES[recipe.target][case.fixed["encoding"]]
        lowered = "Gather" if lowered == "MatMulBnb4" and not whole else lowered
    assert not lowered or (lowered in operators) == (recipe.target not in case.decomposed), operators
    domains = {node.domain for node in model.graph.all_nodes()}
    assert not model.functions and (recipe.target != "onnx/standard" or domains == {""}), domains
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "op.onnx", options, providers=["CPUExecutionProvider"])

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for spec in program.outputs:
            binding.bind_output(spec.name)
        for state in program.states:  # in and out are one buffer, as in a session
            buffer = inputs[state.input]
            binding.bind_output(state.output, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        session.run_with_iobinding(binding)
        return [*binding.copy_outputs_to_cpu()[: len(program.outputs)], *(inputs[s.input] for s in program.states)]

    return step


RUNNERS = tuple(
    Runner(
        recipe.target,
        partial(build, recipe),
        OPERATORS[recipe.target],
        TOLERANCE,
        FILLER[recipe.target],
        left_out=KERNELS_ONLY,
    )
    for (_, mode), recipe in FORMS.items()
    if mode == "exact"
)
