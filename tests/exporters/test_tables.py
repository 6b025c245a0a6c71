"""Weights of a table (fp8, fp4, nf4) through every backend's exporter: read back bit for bit, or as equal weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from device_profiles import load_profile
from exporters import inheritance
from exporters.backends import Job, load_exporter
from exporters.blocks import PARTS, BlockLayout
from exporters.encodings import ENCODINGS, as_integers, values
from exporters.families.modules import QuantizedWeight
from exporters.inheritance import FLOAT, StoredMatrix
from exporters.program import Constant, Inherited, Program, capture
from exporters.quantized import INTEGER, QuantizedTensor
from runtimes.bundle import TensorSpec

#: encoding -> (group, N, K). One with a short last group, one with a scale per row.
SHAPES = {
    "float8_e4m3fn": (64, 6, 96),
    "float8_e5m2": (64, 6, 64),
    "float4_e2m1fn": (16, 5, 48),
    "nf4": (32, 6, 96),
}
KINDS = {
    "onnx/fused": ("onnx", ("fused", "exact"), "host"),
    "onnx/standard": ("onnx", ("standard", "exact"), "host"),
    "openvino": ("openvino", ("ir", "exact"), "host"),
    "tvm": ("tvm", ("compiled", "exact"), "host"),
    "coreml": ("coreml", ("mlprogram", "exact"), "iphone-16-pro"),
    "tensorrt/10": ("tensorrt", ("typed", "exact"), "jetson-orin-nano"),
    "tensorrt/rtx": ("tensorrt", ("typed", "exact"), "rtx-4090"),
}
#: (target, encoding) -> what stands in the artifact instead of the student's codes; all others hold those themselves.
REWRITTEN = {
    ("onnx/fused", "float4_e2m1fn"): INTEGER,
    ("tvm", "float4_e2m1fn"): INTEGER,
    ("tvm", "float8_e4m3fn"): FLOAT,
    ("tvm", "float8_e5m2"): FLOAT,
    ("tvm", "nf4"): FLOAT,
}


def tensor(encoding: str) -> QuantizedTensor:
    """Random codes that are numbers."""
    group, rows, columns = SHAPES[encoding]
    random, bits = np.random.default_rng(columns), ENCODINGS[encoding].bits
    codes = random.integers(0, 1 << bits, (rows, columns), np.uint8)
    codes[~np.isfinite(values(encoding)[codes])] = 0
    scales = random.uniform(1e-3, 0.1, (rows, -(-columns // group))).astype(np.float32)
    return QuantizedTensor.from_codes(codes, scales, None, bits=bits, group=group, encoding=encoding)


class Layer(torch.nn.Module):
    def __init__(self, held: QuantizedTensor) -> None:
        super().__init__()
        self.matrix = QuantizedWeight(*held.shape, BlockLayout.of(held))
        for name, buffer in self.matrix.named_buffers():
            buffer.copy_(torch.from_numpy(PARTS[name](held).copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix.linear(x, None)


def layer(held: QuantizedTensor) -> Program:
    layout, (rows, columns) = BlockLayout.of(held), held.shape
    inherited = Inherited(("layer",), (rows,), columns, layout.bits, layout.block, layout.encoding)
    program = capture(
        "image_encoder",
        Layer(held),
        (torch.zeros(3, columns),),
        {"x": {0: "B"}},
        (TensorSpec("y", "float32", ("B", rows)),),
        ("x",),
        inherited={"matrix": inherited},
    )
    constants = {f"matrix.{name}": Constant.of(PARTS[name](held)) for name in ("codes", "scales")}
    return replace(program, constants={**program.constants, **constants})


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("encoding", SHAPES)
def test_codes_and_scales_arrive(encoding: str, target: str, tmp_path: Path) -> None:
    held = tensor(encoding)
    program, (backend, kind, device) = layer(held), KINDS[target]
    exporter, profile = load_exporter(backend), load_profile(device)
    assert exporter.unsupported(program, profile, kind) == []
    [artifact] = exporter.export(Job(program, profile, tmp_path, [kind]))
    stored = exporter.read_matrices(tmp_path, artifact, program)
    assert stored["matrix"].encoding == REWRITTEN.get((target, encoding), encoding)
    found = inheritance.compare("here", program, stored, {"layer": held})
    assert found == inheritance.Inheritance(3, 3)
    wrong = replace(stored["matrix"], scales=stored["matrix"].scales * np.float32(2))
    if stored["matrix"].encoding == FLOAT:
        wrong = replace(stored["matrix"], codes=stored["matrix"].codes * np.float32(2))
    assert inheritance.compare("here", program, {"matrix": wrong}, {"layer": held}).identical < 3
    assert artifact.precision["weights"].startswith(encoding)


def test_a_rewriting_that_changes_one_weight_is_found() -> None:
    held = tensor("float4_e2m1fn")
    integers = as_integers("float4_e2m1fn")[held.unpack()]
    stored = StoredMatrix(integers, held.scales * np.float32(0.5), None, 8, held.group)
    program = layer(held)
    assert inheritance.compare("here", program, {"matrix": stored}, {"layer": held}).mismatches == ()
    integers[2, 7] += 1
    found = inheritance.compare("here", program, {"matrix": stored}, {"layer": held})
    assert [name.rpartition(" ")[2] for name in found.mismatches] == ["codes", "scales", "points"]


@pytest.mark.parametrize("encoding", ["nf4", "float8_e4m3fn"])
def test_what_no_integers_stand_for_is_not_rewritten(encoding: str) -> None:
    with pytest.raises(ValueError, match="no integers stand for"):
        as_integers(encoding)
