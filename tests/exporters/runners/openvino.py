"""The ops through the OpenVINO exporter's conversion, saved, read and compiled for the CPU as in the exact mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from exporters.openvino_convert import BEAM, convert
from exporters.program import Program
from runtimes.openvino_ import MODES, dividing
from tests.exporters.op_cases import KERNELS_ONLY, Array, Case
from tests.exporters.runners import Runner, Step

TARGET = "openvino/ir"
#: op -> layer of the compiled model
OPERATORS = {
    "add_rms_norm": "RMS",
    "bias_snake": "",
    "codebook_lookup": "Gather",
    "group_norm_silu": "",
    "kv_attention": "ScaledDotProductAttention",
    "projection": "FullyConnected",
    "quantize_activation": "",
    "quantized_embedding": "Gather",
    "quantized_linear": "FullyConnected",
    "rms_norm": "RMS",
    "rope_angles": "",
    "snake": "",
    "swiglu": "",
    "table_embedding": "Gather",
    "table_linear": "FullyConnected",
}


def build(case: Case, program: Program, folder: Path) -> Step:
    """The op written as .xml and .bin and run by the CPU plugin."""
    path = folder / "op.xml"
    ov.save_model(convert(program), path, compress_to_fp16=False)
    core = ov.Core()
    compiled = core.compile_model(
        dividing(core.read_model(path)), "CPU", dict(MODES["exact"]) | {"INFERENCE_NUM_THREADS": 1}
    )
    _check_layers(case, compiled)
    request = compiled.create_infer_request()

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        feeds = {spec.name: inputs[spec.name] for spec in program.inputs}
        if not program.states:
            return [np.array(value) for value in request.infer(feeds).values()]
        # The states here hold what is written and no more: what the table keeps beyond that stays with the table.
        end = int(inputs["last"][0]) + 1
        held = end - inputs["query"].shape[1]
        states = {state.name: state for state in request.query_state()}
        for name, state in states.items():
            state.state = ov.Tensor(np.ascontiguousarray(inputs[name][:, :, :held]))
        feeds[BEAM] = np.arange(len(inputs["last"]), dtype=np.int32)
        [out] = (np.array(value) for value in request.infer(feeds).values())
        caches = [inputs[spec.name].copy() for spec in program.states]
        for spec, cache in zip(program.states, caches, strict=True):
            written = states[spec.name].state.data
            assert written.shape[2] == end
            cache[:, :, :end] = written
        return [out, *caches]

    return step


def _check_layers(case: Case, compiled: Any) -> None:
    """The plugin fused what it should, and reads codes as they are stored."""
    layers: dict[str, set[str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        layers.setdefault(info["layerType"].astype(str), set()).add(info["runtimePrecision"].astype(str))
    expected = OPERATORS[case.op]
    if case.fixed.get("softcap"):  # the fused operator has no such thing
        assert expected not in layers and "Softmax" in layers, layers
        return
    assert not expected or expected in layers, layers
    if case.op.startswith("quantized") and len(case.fixed["codes"]) > 1:  # a single row is dequantised beforehand
        assert f"u{case.fixed['bits']}" in layers[expected], layers
    if case.op == "kv_attention":
        assert ("RoPE" in layers) == (case.fixed["cos"] is not None), layers
        assert {"MatMul", "Softmax"}.isdisjoint(layers), layers


TOLERANCE = {"exact": 0.0, "float32": 3e-6, "float16": 3e-3, "code": 3e-6}
RUNNERS = (Runner(TARGET, build, OPERATORS, TOLERANCE, left_out=KERNELS_ONLY),)
