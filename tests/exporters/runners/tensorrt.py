"""The ops through the TensorRT exporter's three targets, run by ONNX Runtime on the bodies of their functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from exporters import tensorrt_rtx
from exporters.external_data import WeightFile
from exporters.program import Program
from exporters.tensorrt_ import lower
from exporters.tensorrt_generations import GENERATIONS
from tests.exporters.op_cases import CASES, KERNELS_ONLY, Array, Case
from tests.exporters.runners import Runner, Step

GENERATION = {generation.name: generation for generation in GENERATIONS}
#: target -> (generation, kind). Our kernels take float16 alone.
TARGETS = {
    "tensorrt/decomposed/exact": ("10.3", ("typed", "exact")),
    "tensorrt/decomposed/fp16": ("10.3", ("typed", "fp16")),
    "tensorrt/native/exact": ("rtx", ("typed", "exact")),
    "tensorrt/native/fp16": ("rtx", ("typed", "fp16")),
    "tensorrt/fused/fp16": ("10.3", ("fused", "fp16")),
}
_DECOMPOSED = {
    "add_rms_norm": "Sqrt",
    "bias_snake": "Sin",
    "codebook_lookup": "Gather",
    "group_norm_silu": "InstanceNormalization",
    "kv_attention": "Softmax",
    "projection": "DequantizeLinear",
    "quantize_activation": "",
    "quantized_embedding": "Gather",
    "quantized_linear": "DequantizeLinear",
    "rms_norm": "Sqrt",
    "rope_angles": "",
    "snake": "Sin",
    "swiglu": "Sigmoid",
    "table_embedding": "Gather",
    "table_linear": "",  # by its encoding, see _operator
}
_NATIVE = _DECOMPOSED | {
    "add_rms_norm": "RMSNormalization",
    "group_norm_silu": "GroupNormalization",
    "kv_attention": "TRT_KVCacheUpdate",
    "rms_norm": "RMSNormalization",
}
_FUSED = _DECOMPOSED | {
    "bias_snake": "EdgeBiasActivation",
    "codebook_lookup": "EdgeCodebook",
    "group_norm_silu": "EdgeGroupNormSilu",
    "kv_attention": "EdgeAttention",
    "projection": "EdgeLinear",  # or one of its relatives, see KERNELS
    "quantize_activation": "",
    "quantized_linear": "EdgeLinear",
}
OPERATORS = {"decomposed": _DECOMPOSED, "native": _NATIVE, "fused": _FUSED}
#: (norm, gate, residual) -> the kernel of a projection
KERNELS = {
    (False, False, False): "EdgeLinear",
    (False, False, True): "EdgeLinearResidual",
    (False, True, False): "EdgeLinear",
    (False, True, True): "EdgeLinear",
    (True, False, False): "EdgeNormLinear",
    (True, False, True): "EdgeNormLinear",
    (True, True, False): "EdgeNormLinearSwiglu",
}
TOLERANCE = {
    "exact": {"exact": 0.0, "float32": 3e-6, "float16": 4e-3, "code": 3e-6},
    "fp16": {"exact": 5e-4, "float32": 6e-3, "float16": 6e-3, "code": 0.1},
}
#: Where attention is made of products, masked slots are multiplied by 0, so they have to be finite. Kernels clear them.
FILLER = {"decomposed": 50.0, "native": 50.0, "fused": float("nan")}

#: Rows of a run that leaves out what takes long: each op, and the features that a target lowers by itself.
_USUAL_ATTENTION = "kv_attention-packed-groups2-rope"
_EACH = {
    "add_rms_norm-float32-48",
    "bias_snake-image-float32-6",
    "codebook_lookup-4x8-audio-int32",
    "group_norm_silu-image-float32-6in3",
    _USUAL_ATTENTION,
    "projection-int4-block32-zeros-9x41-bias-residual",
    "quantize_activation-int8-token",
    "quantized_embedding-int4-block32-zeros-13x41",
    "quantized_linear-int4-block32-zeros-7x41",
    "rms_norm-float32-48",
    "rope_angles-16-int32",
    "snake-float32-6",
    "swiglu-float32-24",
    "table_embedding-nf4-block32-13x41",
    "table_linear-float4_e2m1fn-block32-9x41",
}
_TABLES = {
    "table_linear-float8_e4m3fn-block128-7x384",
    "table_linear-float8_e4m3fn-block128-6x256-uniform",
    "table_linear-nf4-block64-7x192",
}
_WINDOW, _SEPARATE = "kv_attention-packed-groups2-rope-window-softcap", "kv_attention-separate-groups3-window"
_PRODUCTS = {"quantized_linear-int8-block128-symmetric-33x130", "quantized_linear-int8-block16-zeros-1x37-bias"}
_NORMS = {"add_rms_norm-float32-48", "group_norm_silu-image-float32-6in3", "rms_norm-float32-48"}
USUAL = {
    "tensorrt/decomposed/exact": frozenset({_SEPARATE, *_EACH, *_PRODUCTS} - {_USUAL_ATTENTION}),
    "tensorrt/decomposed/fp16": frozenset({_WINDOW}),
    "tensorrt/native/exact": frozenset({_WINDOW, *_TABLES}),
    "tensorrt/native/fp16": frozenset({_USUAL_ATTENTION, *_NORMS}),
    "tensorrt/fused/fp16": frozenset(
        {
            _WINDOW,
            "kv_attention-packed-groups2-rope-batch2",
            "projection-int4-block32-zeros-9x41-bias-residual",
            "projection-int8-block128-symmetric-7x100-norm",
            "projection-int8-block32-zeros-12x70-norm-gated",
            "projection-int4-block32-zeros-6x64-norm-residual",
            "codebook_lookup-4x8-audio-int32",
            "bias_snake-image-float32-6",
            "group_norm_silu-image-float32-6in3",
        }
    ),
}
#: Ops that every target lowers alike: the first one runs all their rows.
_ALIKE = (
    "codebook_lookup",
    "quantize_activation",
    "quantized_embedding",
    "quantized_linear",
    "rope_angles",
    "snake",
    "swiglu",
    "table_embedding",
)


def _left_out(target: str) -> frozenset[str]:
    """Rows that would only repeat what another target of TensorRT, or another row, shows."""
    alike = frozenset(str(case) for case in CASES if case.op in _ALIKE and str(case) not in _EACH | _PRODUCTS)
    if target == "tensorrt/fused/fp16":  # which has a kernel for codebooks, and one that wants RoPE tables in float32
        own = frozenset(label for label in alike if label.startswith("codebook"))
        return alike - own | {"kv_attention-packed-groups2-rope-float16"}
    return KERNELS_ONLY if target == "tensorrt/decomposed/exact" else KERNELS_ONLY | alike


def _half(value: Array) -> Array:
    return value.astype(np.float16) if value.dtype == np.float32 else value


def _operator(form: str, target: str, case: Case) -> str:
    if form == "fused" and case.op == "projection":
        around = (case.fixed["norm"] is not None, case.fixed["gated"], "residual" in case.dynamic)
        return KERNELS[around]
    if case.op == "table_linear":
        typed = target == "native" and case.fixed["encoding"] == "float8_e4m3fn"
        return "DequantizeLinear" if typed else "Gather"
    return OPERATORS[target][case.op]


def build(name: str, case: Case, program: Program, folder: Path) -> Step:
    """The op lowered as for an export, taken by TensorRT-RTX's parser, and run by ONNX Runtime."""
    generation, kind = GENERATION[TARGETS[name][0]], TARGETS[name][1]
    target = name.split("/")[1]
    program, model = lower(program, kind, generation)
    with WeightFile(folder / "op.data") as weights:
        weights.adopt(model)
    ir.save(model, folder / "op.onnx")
    counts = Counter(node.op_type for node in model.graph)
    wanted = _operator(kind[0], target, case)
    assert not wanted or counts[wanted], counts
    assert {node.domain for node in model.graph} <= {"", "trt", "edge"}
    if tensorrt_rtx.installed():
        tensorrt_rtx.compile_file(folder / "op.onnx", "sm_89", {}, engine=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "op.onnx", options, providers=["CPUExecutionProvider"])
    types = {value.name: value.type for value in session.get_inputs()}
    delta = program.states and target == "decomposed"

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        feeds = {key: _half(value) if types[key] == "tensor(float16)" else value for key, value in inputs.items()}
        results = session.run(None, feeds)
        outputs, states = results[: len(program.outputs)], results[len(program.outputs) :]
        if delta:  # the graph gives the new rows alone, and the session writes them
            end = int(inputs["last"][0]) + 1
            new, states = states, [inputs[state.input].copy() for state in program.states]
            for cache, rows in zip(states, new, strict=True):
                assert rows.shape[2] == inputs["query"].shape[1]
                cache[:, :, end - rows.shape[2] : end] = rows
        kept = [state.astype(inputs[s.input].dtype) for s, state in zip(program.states, states, strict=True)]
        return [*outputs, *kept]

    return step


RUNNERS = tuple(
    Runner(
        name,
        partial(build, name),
        OPERATORS[name.split("/")[1]],
        TOLERANCE[kind[1]],
        FILLER[name.split("/")[1]],
        left_out=_left_out(name),
        usual=USUAL[name],
    )
    for name, (_, kind) in TARGETS.items()
)
