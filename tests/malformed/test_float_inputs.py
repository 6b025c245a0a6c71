"""Checkpoints of float codes, nf4 and rounded inputs that say what cannot be: each is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.encodings import values
from exporters.errors import ConfigError, QuantizationError, WeightsError
from tests.exporters.plain import write_plain
from tests.malformed.packages import load_refused, loads

PROJ = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def _random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8)


def _fp8(rows: int, columns: int) -> Tensors:
    return {"weight": _random(rows, columns).view(torch.float8_e4m3fn), "weight_scale": torch.full((rows, 1), 0.01)}


def _static(rows: int, columns: int) -> Tensors:
    return _fp8(rows, columns) | {"input_scale": torch.tensor([0.02])}


def _nvfp4(rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": _random(rows, columns // 2),
        "weight_scale": torch.full((rows, columns // 16), 2.0).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([700.0]),
    }


def _mxfp4(rows: int, columns: int) -> Tensors:
    return {"weight_packed": _random(rows, columns // 2), "weight_scale": _random(rows, -(-columns // 32))}


def _blocks(rows: int, columns: int) -> Tensors:
    grid = (-(-rows // 16), -(-columns // 16))
    return {"weight": _random(rows, columns).view(torch.float8_e4m3fn), "weight_scale_inv": torch.full(grid, 0.01)}


def _nf4(rows: int, columns: int) -> Tensors:
    state = dict(quant_type="nf4", blocksize=32, dtype="float32", shape=[rows, columns])
    return {
        "weight": _random(rows * columns // 2, 1),
        "weight.absmax": torch.full((-(-rows * columns // 32),), 0.5),
        "weight.quant_map": torch.from_numpy(values("nf4").copy()),
        "weight.quant_state.bitsandbytes__nf4": _text(state),
    }


def _text(value: Any) -> torch.Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {"quant_method": "compressed-tensors", "config_groups": {"all": group}, "ignore": ["lm_head"]}


FP8 = dict(num_bits=8, type="float", symmetric=True, strategy="channel")
NVFP4 = dict(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
MXFP4 = dict(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
STATIC = dict(num_bits=8, type="float", strategy="tensor", dynamic=False)
CASES: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any]]] = {
    "fp8": (_fp8, _compressed("float-quantized", FP8)),
    "static": (_static, _compressed("float-quantized", FP8, STATIC)),
    "nvfp4": (_nvfp4, _compressed("nvfp4-pack-quantized", NVFP4)),
    "mxfp4": (_mxfp4, _compressed("mxfp4-pack-quantized", MXFP4)),
    "blocks": (_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}),
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    def make(
        case: str, parts: Callable[[Tensors], object] = len, config: Callable[[dict[str, Any]], object] = len
    ) -> Path:
        """A checkpoint whose q_proj and quantization_config were changed."""
        path = write_plain(tmp_path / "student", intermediate_size=64)
        store, method = CASES[case]
        tensors = load_file(path / "model.safetensors")
        for name in [name for name in tensors if "_proj.weight" in name]:
            made = store(*tensors.pop(name).shape)
            module = name.removesuffix(".weight")
            if module == PROJ:
                parts(made)
            tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((path / "config.json").read_text())
        stored["quantization_config"] = json.loads(json.dumps(method))
        config(stored["quantization_config"])
        (path / "config.json").write_text(json.dumps(stored))
        return path

    return make


@pytest.mark.parametrize("case", CASES)
def test_as_they_should_be(folder: Callable[..., Path], case: str) -> None:
    assert len(loads(folder(case)).quantized) == 7


def _at(part: str, value: float) -> Callable[[Tensors], object]:
    def change(parts: Tensors) -> None:
        parts[part].reshape(-1)[-1:] = value

    return change


def _byte(part: str, value: int) -> Callable[[Tensors], object]:
    def change(parts: Tensors) -> None:
        parts[part].view(torch.uint8).reshape(-1)[-1] = value

    return change


def _state(**changes: Any) -> Callable[[Tensors], object]:
    name = "weight.quant_state.bitsandbytes__nf4"

    def change(parts: Tensors) -> None:
        parts[name] = _text({**json.loads(parts[name].numpy().tobytes()), **changes})

    return change


VALUES: list[tuple[str, str, Callable[[Tensors], object], type, str]] = [
    ("fp8 NaN", "fp8", _byte("weight", 0x7F), QuantizationError, "weight: holds NaN"),
    ("fp8 negative NaN", "fp8", _byte("weight", 0xFF), QuantizationError, "weight: holds NaN"),
    ("fp8 scale of zero", "fp8", _at("weight_scale", 0.0), QuantizationError, "weight_scale"),
    ("fp8 scale infinite", "fp8", _at("weight_scale", float("inf")), QuantizationError, "weight_scale"),
    ("fp8 without a scale", "fp8", lambda p: p.pop("weight_scale"), WeightsError, "weight_scale"),
    ("fp8 as bytes", "fp8", lambda p: p.update(weight=p["weight"].view(torch.uint8)), WeightsError, "F8_E4M3"),
    (
        "fp8 zero points",
        "fp8",
        lambda p: p.update(weight_zero_point=torch.ones(32, 1, dtype=torch.int8)),
        QuantizationError,
        "zero points",
    ),
    ("static scale missing", "static", lambda p: p.pop("input_scale"), WeightsError, "input_scale"),
    ("static scale of zero", "static", _at("input_scale", 0.0), QuantizationError, "input_scale"),
    ("static scale NaN", "static", _at("input_scale", float("nan")), QuantizationError, "input_scale"),
    (
        "static zero points",
        "static",
        lambda p: p.update(input_zero_point=torch.ones(1)),
        QuantizationError,
        "input_zero_point",
    ),
    ("global scale of zero", "nvfp4", _at("weight_global_scale", 0.0), QuantizationError, "weight_global_scale"),
    (
        "global scale infinite",
        "nvfp4",
        _at("weight_global_scale", float("inf")),
        QuantizationError,
        "weight_global_scale",
    ),
    ("global scale tiny", "nvfp4", _at("weight_global_scale", 1e-39), QuantizationError, "overflow"),
    ("nvfp4 scale NaN", "nvfp4", _byte("weight_scale", 0x7F), QuantizationError, "weight_scale"),
    ("nvfp4 scale negative", "nvfp4", _byte("weight_scale", 0x81), QuantizationError, "weight_scale"),
    ("mxfp4 exponent", "mxfp4", _byte("weight_scale", 255), QuantizationError, "exponent 255"),
    ("block NaN", "blocks", _byte("weight", 0x7F), QuantizationError, "weight: holds NaN"),
    ("block scale", "blocks", _at("weight_scale_inv", -1.0), QuantizationError, "weight_scale_inv"),
    (
        "block grid",
        "blocks",
        lambda p: p.update(weight_scale_inv=p["weight_scale_inv"][:1]),
        WeightsError,
        "weight_scale_inv",
    ),
    ("nf4 table", "nf4", _at("weight.quant_map", 1.5), QuantizationError, "quant_map"),
    ("nf4 scale", "nf4", _at("weight.absmax", float("inf")), QuantizationError, "absmax"),
    ("nf4 kind", "nf4", _state(quant_type="fp4"), QuantizationError, "'fp4'"),
    ("nf4 blocks", "nf4", _state(blocksize=48), QuantizationError, "blocksize is 48"),
    ("nf4 blocks as text", "nf4", _state(blocksize="64"), QuantizationError, "blocksize"),
    ("nf4 shape", "nf4", _state(shape=[32, 31]), QuantizationError, "[32, 31]"),
    ("nf4 nested", "nf4", _state(nested_blocksize=-1), QuantizationError, "nested_blocksize"),
    ("nf4 nested without", "nf4", _state(nested_blocksize=256), WeightsError, "absmax"),
    (
        "nf4 state",
        "nf4",
        lambda p: p.update({"weight.quant_state.bitsandbytes__nf4": _text(b"{not json")}),
        ConfigError,
        "quant_state",
    ),
    (
        "nf4 state as list",
        "nf4",
        lambda p: p.update({"weight.quant_state.bitsandbytes__nf4": _text([1])}),
        QuantizationError,
        "not an object",
    ),
]


@pytest.mark.parametrize(
    ("case", "change", "kind", "word"), [row[1:] for row in VALUES], ids=[row[0] for row in VALUES]
)
def test_values_that_cannot_be(
    folder: Callable[..., Path], case: str, change: Callable[[Tensors], object], kind: Any, word: str
) -> None:
    load_refused(folder(case, change), kind, word)


def _weights(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["all"]["weights"].update(changes)


def _inputs(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["all"].update(input_activations=changes)


FIELDS: list[tuple[str, str, Callable[[dict[str, Any]], object], str]] = [
    ("fp8 of 6 bits", "fp8", _weights(num_bits=6), "6 bits"),
    ("fp8 that is int", "fp8", _weights(type="int"), "'int'"),
    ("fp8 not symmetric", "fp8", _weights(symmetric=False), "symmetric"),
    ("fp8 reordered", "fp8", _weights(actorder="group"), "reordered"),
    ("fp8 strategy", "fp8", _weights(strategy="token"), "'token'"),
    ("fp8 block", "fp8", _weights(strategy="block", block_structure=[16, 0]), "block_structure"),
    ("fp8 group that does not fit", "fp8", _weights(strategy="group", group_size=24), "does not divide"),
    ("nvfp4 group", "nvfp4", _weights(group_size=32), "groups of 16"),
    ("mxfp4 group", "mxfp4", _weights(group_size=16), "groups of 32"),
    ("inputs as text", "fp8", lambda c: c["config_groups"]["all"].update(input_activations="int8"), "'int8'"),
    ("inputs of 16 bits", "fp8", _inputs(num_bits=16, type="float"), "16 bits"),
    ("inputs of a bit", "fp8", _inputs(num_bits=True), "True bits"),
    ("inputs by tensor", "fp8", _inputs(num_bits=8, strategy="tensor", dynamic=True), "all tokens"),
    ("inputs by channel", "fp8", _inputs(num_bits=8, strategy="channel", dynamic=True), "'channel'"),
    ("inputs in groups that do not fit", "fp8", _inputs(strategy="group", group_size=24, dynamic=True), "divide K"),
    ("inputs in groups of text", "fp8", _inputs(strategy="group", group_size="8", dynamic=True), "group_size"),
    ("inputs of powers of two", "fp8", _inputs(type="float", scale_dtype="torch.uint8", group_size=32), "MX"),
    ("inputs of fp8 with zero points", "fp8", _inputs(type="float", symmetric=False), "symmetric"),
    ("inputs of fp4 per token", "fp8", _inputs(type="float", num_bits=4, strategy="token", dynamic=True), "token"),
    ("cache", "fp8", lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"}), "kv_cache_scheme"),
    ("outputs", "fp8", lambda c: c["config_groups"]["all"].update(output_activations=FP8), "output_activations"),
    ("scheme", "blocks", lambda c: c.update(activation_scheme="sometimes"), "activation_scheme"),
    ("blocks of text", "blocks", lambda c: c.update(weight_block_size="128"), "weight_block_size"),
    ("blocks of nothing", "blocks", lambda c: c.update(weight_block_size=[16, 0]), "weight_block_size"),
    ("scales of another kind", "blocks", lambda c: c.update(scale_fmt="e5m3"), "scale_fmt"),
    ("codes of another kind", "blocks", lambda c: c.update(fmt="e5m2"), "fmt"),
    ("embeddings", "blocks", lambda c: c.update(modules_to_convert=["embed_tokens"]), "modules_to_convert"),
    ("bitsandbytes fp4", "nf4", lambda c: c.update(bnb_4bit_quant_type="fp4"), "'fp4'"),
]


@pytest.mark.parametrize(("case", "change", "word"), [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS])
def test_fields_that_are_not_carried_over(
    folder: Callable[..., Path], case: str, change: Callable[[dict[str, Any]], object], word: str
) -> None:
    load_refused(folder(case, config=change), QuantizationError, word)


def test_a_tied_head_cannot_round_its_input(folder: Callable[..., Path]) -> None:
    """The scheme matches it, and nothing of it would arrive: the head multiplies with the embedding's weight."""
    path = folder("static", config=lambda config: config.update(ignore=[]))
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    stored = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(stored))
    load_refused(path, QuantizationError, "lm_head", "ignore")
    stored["quantization_config"]["ignore"] = ["lm_head"]
    (path / "config.json").write_text(json.dumps(stored))
    assert len(loads(path).activations) == 7
