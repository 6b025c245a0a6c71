"""Checkpoints of float codes and rounded inputs: decoders against the formats' own libraries, whole forwards too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from device_profiles import load_profile
from exporters import inheritance
from exporters.backends import Job, load_exporter
from exporters.checkpoint import Checkpoint
from exporters.encodings import values
from exporters.families.decoder_lm import build_reference, capture_lm
from exporters.plan import plan_entries
from exporters.quantization_config import module_schemes
from exporters.quantized import QuantizedTensor
from exporters.student import load_student
from exporters.traffic import narrowest_input
from tests.exporters.plain import CONTEXT, write_plain

FP8 = dict(num_bits=8, type="float", symmetric=True)
INT8 = dict(num_bits=8, type="int", symmetric=True)
TOKEN = dict(strategy="token", dynamic=True)
STATIC = dict(strategy="tensor", dynamic=False)
NVFP4 = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
#: name -> (format, weights, input_activations)
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8-tensor": ("float-quantized", FP8 | dict(strategy="tensor"), None),
    "fp8-channel-token": ("float-quantized", FP8 | dict(strategy="channel"), FP8 | TOKEN),
    "fp8-static": ("float-quantized", FP8 | dict(strategy="tensor"), FP8 | STATIC),
    "fp8-block": ("float-quantized", FP8 | dict(strategy="block", block_structure=[32, 32]), None),
    "fp8-group": ("float-quantized", FP8 | dict(strategy="group", group_size=16), None),
    "nvfp4a16": ("nvfp4-pack-quantized", NVFP4, None),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, NVFP4 | dict(dynamic="local")),
    "w8a8-token": ("int-quantized", INT8 | dict(strategy="channel"), INT8 | TOKEN),
    "w8a8-token-zeros": ("int-quantized", INT8 | dict(strategy="channel"), INT8 | TOKEN | dict(symmetric=False)),
    "w8a8-static": ("int-quantized", INT8 | dict(strategy="channel"), INT8 | STATIC),
    "w4a8": (
        "pack-quantized",
        dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=16),
        INT8 | TOKEN,
    ),
}


def qparams(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scale, zero point and global scale of a weight, by the library's own functions."""
    whole = None
    blocks = weight.reshape(1, -1)
    if args.strategy == "channel":
        blocks = weight
    elif args.strategy in ("group", "tensor_group"):
        blocks = weight.unflatten(-1, (-1, args.group_size))
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns)).transpose(1, 2).flatten(2)
    if args.strategy == "tensor_group":
        whole = generate_gparam(weight.min(), weight.max())
    low, high = blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "channel":
        low, high = low[:, None], high[:, None]
    return *calculate_qparams(low, high, args, global_scale=whole), whole


@torch.no_grad()
def quantised(name: str, folder: Path) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """(checkpoint, logits, weights) of a random model, as the library quantises, computes and stores it."""
    form, weights, inputs = SCHEMES[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    config = QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"], format=form)
    model = AutoModelForCausalLM.from_pretrained(write_plain(folder / "float"), dtype=torch.float32).eval()
    apply_quantization_config(model, config)
    held = {}
    for path, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not isinstance(module, nn.Linear):
            continue
        scale, zero, whole = qparams(module.weight, scheme.weights)
        parts = {"weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
        if scheme.input_activations is not None:
            parts |= {"input_scale": torch.tensor([0.013]), "input_zero_point": torch.tensor([0])}
            parts |= {"input_global_scale": torch.tensor([731.5])}
        for part, value in parts.items():
            if value is not None and hasattr(module, part):
                old = getattr(module, part)
                setattr(module, part, nn.Parameter(value.reshape(old.shape).to(old.dtype), requires_grad=False))
        module.quantization_status = QuantizationStatus.FROZEN
        held[path] = forward_quantize(module, module.weight, "weight", scheme.weights)
    logits = model(IDS).logits
    ModelCompressor(quantization_config=config).compress_model(model)
    target = folder / "quantised"
    target.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, target / "model.safetensors")
    stored = json.loads((folder / "float" / "config.json").read_text())
    stored["quantization_config"] = {**config.model_dump(mode="json"), "quantization_status": "compressed"}
    (target / "config.json").write_text(json.dumps(stored))
    return target, logits, held


def decoded(folder: Path, tensors: Mapping[str, torch.Tensor], config: Any, shape: tuple[int, int]) -> QuantizedTensor:
    """One linear layer "m"; every tensor must be one that its format names."""
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    stored = Checkpoint(folder, ["model.safetensors"])
    found = module_schemes(config, {"m": ("Linear", "Module")}, stored)["m"]
    found.check("m", shape)
    layout = found.layout(shape)
    assert set(layout) == set(tensors)
    for name, (dtypes, shapes) in layout.items():
        info = stored.tensors[f"m.{name}"]
        assert info.dtype in dtypes and info.shape in shapes, name
    return found.decode(stored.tensor, "m", shape)


def test_blocks_of_nf4_that_do_not_end_with_a_row(tmp_path: Path) -> None:
    rows, columns, block = 7, 96, 64
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, rows * columns, np.uint8)
    scales = random.uniform(0.1, 1, -(-rows * columns // block)).astype(np.float32)
    state = dict(quant_type="nf4", blocksize=block, dtype="float32", shape=[rows, columns])
    parts = {
        "weight": codes[0::2, None] << 4 | codes[1::2, None],
        "weight.absmax": scales,
        "weight.quant_map": values("nf4").copy(),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
    }
    config = dict(quant_method="bitsandbytes", load_in_4bit=True)
    found = decoded(tmp_path, {name: torch.from_numpy(part) for name, part in parts.items()}, config, (rows, columns))
    for i, (code, value) in enumerate(zip(codes, found.dequantize().reshape(-1), strict=True)):
        assert value == values("nf4")[code] * scales[i // block]


@pytest.mark.parametrize("form", ["float", "ue8m0"])
def test_fine_grained_fp8_repeats_a_scale_over_its_block(form: str, tmp_path: Path) -> None:
    shape, block = (40, 64), [32, 32]
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=random) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=random) * 0.01 + 1e-4
    if form == "ue8m0":
        scales = scales.to(torch.float8_e8m0fnu)
    config = dict(quant_method="fp8", weight_block_size=block, activation_scheme="dynamic", scale_fmt=form)
    found = decoded(tmp_path, {"weight": weight, "weight_scale_inv": scales}, config, shape)
    wide = scales.float().repeat_interleave(32, 0)[:40].repeat_interleave(32, 1)
    np.testing.assert_array_equal(found.dequantize(), (weight.float() * wide).numpy())
    whole = _dequantize_fp8_weight(weight[:32], scales[:1], block, torch.float32)
    np.testing.assert_array_equal(found.dequantize()[:32], whole.numpy())


@pytest.mark.parametrize("form", ["mxfp4-pack-quantized", "mxfp8-quantized"])
def test_mx_is_what_compressed_tensors_decompresses(form: str, tmp_path: Path) -> None:
    """Every code, and every exponent that a bfloat16 holds with it."""
    rows, columns = 250, 64
    codes = torch.randint(0, 256, (rows, columns // (2 if "4" in form else 1)), dtype=torch.uint8)
    scales = (torch.arange(rows * 2) % 245 + 5).reshape(rows, 2).to(torch.uint8)
    bits = 4 if "4" in form else 8
    weights = dict(num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    if bits == 8:
        codes[(codes & 0x7F) == 0x7F] = 0
        parts = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    else:
        parts = {"weight_packed": codes, "weight_scale": scales}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"all": group}}
    found = decoded(tmp_path, parts, config, (rows, columns))
    scheme = QuantizationScheme.model_validate(group)
    theirs = BaseCompressor.get_value_from_registry(form).decompress(dict(parts), scheme)["weight"]
    np.testing.assert_array_equal(torch.from_numpy(found.dequantize()).to(theirs.dtype).float(), theirs.float())


IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            folder, logits, held = quantised(name, tmp_path_factory.mktemp(name))
            made[name] = load_student(folder), logits, held
        return made[name]

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_and_logits_are_the_librarys(name: str, checkpoint: Any) -> None:
    student, logits, held = checkpoint(name)
    assert sorted(student.quantized) == sorted(held) and len(held) == 7
    for module, weight in held.items():
        np.testing.assert_array_equal(student.quantized[module].dequantize(), weight.numpy())
    assert len(student.activations) == (7 if SCHEMES[name][2] else 0)
    with torch.no_grad():
        torch.testing.assert_close(build_reference(student)(IDS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8-channel-token", "nvfp4", "w8a8-token", "w8a8-static"])
def test_the_captured_model_computes_the_same(name: str, checkpoint: Any, tmp_path: Path) -> None:
    """Through ONNX Runtime; what is rounded may fall to the other side of a tie."""
    student, logits, _ = checkpoint(name)
    program = capture_lm(student, CONTEXT)
    exporter = load_exporter("onnx")
    [artifact] = exporter.export(Job(program, load_profile("host"), tmp_path, [("fused", "exact")]))
    found = inheritance.compare(name, program, exporter.read_matrices(tmp_path, artifact, program), student.quantized)
    assert found == inheritance.Inheritance(21, 21)
    session = onnxruntime.InferenceSession(tmp_path / artifact.model, providers=["CPUExecutionProvider"])
    feeds = {"ids": IDS.numpy().astype(np.int32), "last": np.array([IDS.shape[1] - 1], np.int32)}
    feeds |= {state.input: np.zeros(state.shape, np.float32) for state in program.states}
    got = session.run(["logits"], feeds)[0]
    difference = np.abs(got - logits[:, -1].numpy()).max() / np.abs(logits.numpy()).max()
    assert difference < 2e-2
    assert np.corrcoef(got[0], logits[0, -1].numpy())[0, 1] > 0.9999


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4), ("w8a8-token", 8)])
def test_a_fast_mode_does_not_round_again_what_has_4_bits(name: str, bits: int, checkpoint: Any) -> None:
    program = capture_lm(checkpoint(name)[0], CONTEXT)
    assert narrowest_input(program) == bits
    reasons = {entry.label: entry.left_out for entry in plan_entries(load_profile("host"), program, ["onnx"])}
    assert reasons["onnx/fused/exact"] == ""
    assert ("rounds its input to 4 bits" in reasons["onnx/fused/fast"]) == (bits == 4)
