"""BAD_INPUTS, row Quantised checkpoint, for the formats whose tensors say more than config.json does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters.errors import ConfigError, ExportError, QuantizationError, WeightsError
from exporters.student import load_student
from tests.malformed.packages import edit_json, load_refused
from tests.refusals import raises
from tools.make_checkpoints import write

PROJ = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], object]


def _changed(
    folder: Path, case: str, config: Change | None = None, tensors: Change | None = None, header: Change | None = None
) -> Path:
    """A checkpoint of tools/make_checkpoints.py, damaged."""
    path = folder / case
    write(path, case)
    if config is not None:
        edit_json(path / "config.json", lambda value: config(value["quantization_config"]))
    if tensors is not None or header is not None:
        file = path / "model.safetensors"
        with safe_open(file, "pt") as opened:
            described = dict(opened.metadata())
        stored = load_file(file)
        for change, value in ((tensors, stored), (header, described)):
            if change is not None:
                change(value)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file, metadata=described)
    return path


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{PROJ}.{name}": change(tensors[f"{PROJ}.{name}"])})


def _at(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def _byte(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first code set to ``value``."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8).clone()
        raw[0, 0] = value
        return raw.view(tensor.dtype)

    return change


CONFIG: list[tuple[str, str, dict[str, Any], str]] = [
    ("gptq bits", "gptq-4bit", {"bits": 5}, "bits is 5"),
    ("gptq bits as text", "gptq-4bit", {"bits": "4"}, "bits is '4'"),
    ("gptq group", "gptq-4bit", {"group_size": 0}, "group_size is 0"),
    ("gptq layout", "gptq-4bit", {"checkpoint_format": "marlin"}, "marlin"),
    ("gptq planes", "gptq-4bit", {"checkpoint_format": "gptq_p"}, "gptq_p"),
    ("gptq words", "gptq-4bit", {"pack_dtype": "int16"}, "int16"),
    ("gptq dynamic", "gptq-4bit", {"dynamic": ["a"]}, "patterns"),
    ("gptq pattern", "gptq-4bit", {"dynamic": {"(a+)+$": {"bits": 2}}}, "unbounded"),
    ("gptq broken pattern", "gptq-4bit", {"dynamic": {"+:(": {"bits": 2}}}, "compile"),
    ("gptq left out", "gptq-4bit", {"dynamic": {"-:.*q_proj": {}}}, "leaves the module out"),
    ("gptq override", "gptq-4bit", {"dynamic": {".*q_proj": 8}}, "is 8"),
    ("awq bits", "awq-4bit", {"bits": 8}, "bits is 8"),
    ("awq layout", "awq-4bit", {"version": "gemv"}, "gemv"),
    ("awq layout missing", "awq-4bit", {"version": None}, "version is None"),
    ("awq zero points", "awq-4bit", {"zero_point": None}, "zero_point"),
    ("awq no zero points", "awq-4bit", {"zero_point": False}, "zero_point is false"),
    ("awq writer", "awq-4bit", {"backend": "llm-awq"}, "llm-awq"),
    ("awq left out", "awq-4bit", {"modules_to_not_convert": ["q_proj"]}, "leaves the module out"),
    ("autoround packing", "autoround-4bit", {"packing_format": "auto_round:fp8_static"}, "fp8_static"),
    ("autoround type", "autoround-4bit", {"data_type": "mx_fp"}, "mx_fp"),
    ("autoround activations", "autoround-4bit", {"act_bits": 8}, "act_bits is 8"),
    ("autoround modules", "autoround-4bit", {"extra_config": ["a"]}, "modules and their values"),
    ("autoround module", "autoround-4bit", {"extra_config": {PROJ: {"bits": 6}}}, "bits is 6"),
    ("autoround pattern", "autoround-4bit", {"extra_config": {"(a+)+": {"bits": 4}}}, "unbounded"),
    (
        "autoround awq",
        "autoround-4bit",
        {"packing_format": "auto_round:auto_awq", "extra_config": {PROJ: {"group_size": 16}}},
        "values of their own",
    ),
    ("bitsandbytes", "bitsandbytes-int8", {"load_in_8bit": False}, "load_in_8bit"),
    ("qat version", "qat-4bit", {"version": 2}, "version is 2"),
    ("qat symmetric", "qat-4bit", {"symmetric": None}, "symmetric"),
    ("qat module", "qat-4bit", {"modules": {"nowhere": {"bits": 8}}}, "nowhere"),
    ("qat key", "qat-4bit", {"modules": {PROJ: {"width": 8}}}, "other keys"),
]


@pytest.mark.parametrize(("case", "change", "word"), [row[1:] for row in CONFIG], ids=[row[0] for row in CONFIG])
def test_a_config_that_is_not_carried_over(tmp_path: Path, case: str, change: dict[str, Any], word: str) -> None:
    error = load_refused(_changed(tmp_path, case, lambda c: c.update(change)), QuantizationError, word)
    assert "quantization_config" in error.where or PROJ in error.where


TENSORS: list[tuple[str, str, Change, type[ExportError], str]] = [
    ("gptq no codes", "gptq-4bit", lambda t: t.pop(f"{PROJ}.qweight"), WeightsError, f"{PROJ}.weight"),
    ("gptq no zeros", "gptq-4bit", lambda t: t.pop(f"{PROJ}.qzeros"), WeightsError, "qzeros"),
    ("gptq no order", "gptq-4bit-act-order", lambda t: t.pop(f"{PROJ}.g_idx"), WeightsError, "g_idx"),
    ("gptq shape", "gptq-4bit", _set("qweight", lambda t: t[:-1]), WeightsError, "qweight"),
    ("gptq dtype", "gptq-4bit", _set("qweight", lambda t: t.long()), WeightsError, "qweight"),
    ("gptq group past the end", "gptq-4bit", _set("g_idx", _at((3,), 2)), QuantizationError, "there are 2"),
    ("gptq group below zero", "gptq-4bit", _set("g_idx", _at((3,), -1)), QuantizationError, "lowest -1"),
    ("gptq uneven groups", "gptq-4bit", _set("g_idx", _at((3,), 1)), QuantizationError, "31 features into group 0"),
    ("gptq scale of zero", "gptq-4bit", _set("scales", _at((0, 0), 0.0)), QuantizationError, "zero, negative"),
    ("gptq scale NaN", "gptq-4bit", _set("scales", _at((0, 0), float("nan"))), QuantizationError, "not finite"),
    (
        "gptq bias", "gptq-4bit", lambda t: t.update({f"{PROJ}.bias": torch.ones(64)}), WeightsError, "does not have",
    ),
    ("awq shape", "awq-4bit", _set("qzeros", lambda t: t[:, :-1]), WeightsError, "qzeros"),
    ("awq negative scale", "awq-4bit", _set("scales", _at((0, 0), -1.0)), QuantizationError, "negative"),
    ("torchao past the bits", "torchao-int4", _set("_weight_qdata", _at((0, 0), 8)), QuantizationError, "outside 4"),
    ("torchao no scale", "torchao-int8", lambda t: t.pop(f"{PROJ}._weight_scale"), WeightsError, "_weight_scale"),
    ("bitsandbytes tiles", "bitsandbytes-int8", _set("weight_format", lambda t: t + 2), QuantizationError, "order 2"),
    ("bitsandbytes SCB", "bitsandbytes-int8", _set("SCB", _at((0,), 0.0)), QuantizationError, "SCB"),
    ("qat off the grid", "qat-4bit", _set("weight", lambda t: t * 1.01), QuantizationError, "off the grid"),
    ("qat scale", "qat-4bit", _set("weight_scale", lambda t: t[:, :1]), WeightsError, "weight_scale"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change", "kind", "word"), [row[1:] for row in TENSORS], ids=[row[0] for row in TENSORS]
)
def test_tensors_that_cannot_be(tmp_path: Path, case: str, change: Change, kind: type[ExportError], word: str) -> None:
    load_refused(_changed(tmp_path, case, tensors=change), kind, word)


def _described(**changes: Any) -> Change:
    def change(header: dict[str, str]) -> None:
        value = json.loads(header[f"{PROJ}.weight"])
        for key, entry in changes.items():
            (value if key in value else value["_data"])[key] = entry
        header[f"{PROJ}.weight"] = json.dumps(value)

    return change


HEADERS: list[tuple[str, Change, type[ExportError], str]] = [
    ("missing", lambda h: h.pop(f"{PROJ}.weight"), QuantizationError, "is missing"),
    ("no JSON", lambda h: h.update({f"{PROJ}.weight": "{"}), ConfigError, "metadata"),
    ("a list", lambda h: h.update({f"{PROJ}.weight": "[]"}), QuantizationError, "is '[]'"),
    ("int4", _described(_type="Int4Tensor"), QuantizationError, "floats in the weight's own unit"),
    ("tiles", _described(_type="Int4TilePackedTo4dTensor"), QuantizationError, "in a GPU's tiles"),
    ("words", _described(_type="Int4PlainInt32Tensor"), QuantizationError, "XPU's or NPU's own conversion"),
    ("unknown", _described(_type="Float6Tensor"), QuantizationError, "Float6Tensor"),
    ("activations", _described(activation_quantization="int4_per_token"), QuantizationError, "int4_per_token"),
    ("factors", _described(_tensor_data_names=["qdata", "act_pre_scale"]), QuantizationError, "act_pre_scale"),
    ("block", _described(block_size=[0, 32]), QuantizationError, "block_size"),
    ("a block of no rows", _described(block_size=32), QuantizationError, "block_size"),
    ("a block that does not divide", _described(block_size=[1, 40]), QuantizationError, "does not divide"),
    ("bits", _described(target_dtype={"_type": "torch.dtype", "_data": "int9"}), QuantizationError, "int9"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_torchaos_header(tmp_path: Path, change: Change, kind: type[ExportError], word: str) -> None:
    load_refused(_changed(tmp_path, "torchao-int4", header=change), kind, word)


INT8 = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}, "mapping_type": {"_type": "M", "_data": "SYMMETRIC"}}
PER_TENSOR = {"granularity": {"_type": "PerTensor", "_data": {}}}


def _inputs(**changes: Any) -> Change:
    return _described(act_quant_kwargs={"_type": "Kwargs", "_data": INT8 | changes})


OTHERS: list[tuple[str, str, Change, str]] = [
    ("one scale for all tokens", "torchao-int8", _inputs(**PER_TENSOR), "from all tokens that are run together"),
    ("7 bits", "torchao-int8", _inputs(reduce_range=True), "reduced range of 7 bits"),
    ("mapping", "torchao-int8", _inputs(mapping_type={"_type": "M", "_data": "ODD"}), "'ODD'"),
    ("granularity", "torchao-int8", _inputs(granularity={"_type": "PerAxis", "_data": {"axis": 0}}), "PerAxis"),
    ("options", "torchao-int8", _described(act_quant_kwargs=[1]), "act_quant_kwargs is [1]"),
    ("fp8 of another type", "torchao-fp8", _inputs(float8_dtype="float8_e5m2"), "float8_e5m2"),
    ("fp8 bounds", "torchao-fp8", _inputs(hp_value_ub=1200.0), "hp_value_ub bounds"),
    ("mx inputs", "torchao-mxfp8", _inputs(), "MXTensor's own rule"),
    ("mx of 6 bits", "torchao-mxfp8", _described(elem_dtype="fp6_e3m2"), "fp6_e3m2"),
    ("mx blocks", "torchao-mxfp8", _described(block_size=33), "block_size is 33"),
    ("mx tiles", "torchao-mxfp8", _described(is_swizzled_scales="yes"), "is_swizzled_scales is 'yes'"),
    ("nvfp4 inputs", "torchao-nvfp4", _inputs(), "NVFP4Tensor's own rule"),
    ("nvfp4 blocks", "torchao-nvfp4", _described(block_size=32), "block_size is 32"),
]


@pytest.mark.parametrize(("case", "change", "word"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_torchaos_header_of_other_classes(tmp_path: Path, case: str, change: Change, word: str) -> None:
    load_refused(_changed(tmp_path, case, header=change), QuantizationError, f"metadata of {PROJ}.weight", word)


FLOATS: list[tuple[str, str, Change, type[ExportError], str]] = [
    ("fp8 NaN", "torchao-fp8", _set("_weight_qdata", _byte(0x7F)), QuantizationError, "NaN"),
    ("fp8 scale of zero", "torchao-fp8", _set("_weight_scale", _at((0, 0), 0.0)), QuantizationError, "zero, negative"),
    ("mx exponent", "torchao-mxfp8", _set("_weight_scale", _byte(255)), QuantizationError, "exponent 255"),
    ("nvfp4 scale", "torchao-nvfp4", _set("_weight_scale", _byte(0xB8)), QuantizationError, "negative or NaN"),
    ("nvfp4 rows of scales", "torchao-nvfp4", _set("_weight_scale", lambda t: t[:16]), WeightsError, "_weight_scale"),
    (
        "nvfp4 whole", "torchao-nvfp4", _set("_weight_per_tensor_scale", lambda t: -t), QuantizationError, "negative",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change", "kind", "word"), [row[1:] for row in FLOATS], ids=[row[0] for row in FLOATS]
)
def test_float_tensors_of_torchao_that_cannot_be(
    tmp_path: Path, case: str, change: Change, kind: type[ExportError], word: str
) -> None:
    load_refused(_changed(tmp_path, case, tensors=change), kind, word)


def test_a_bias_of_zeros_says_nothing(tmp_path: Path) -> None:
    """AutoGPTQ writes one for layers that have none."""
    zeros = {f"{PROJ}.bias": torch.zeros(64, dtype=torch.float16)}
    path = _changed(tmp_path, "gptq-4bit", tensors=lambda tensors: tensors.update(zeros))
    assert f"{PROJ}.bias" not in load_student(path).tensors
    # Where the model has one, it is a bias like any other.
    others = {f"{PROJ[:-6]}{part}_proj.bias": torch.ones(size) for part, size in (("k", 32), ("v", 32), ("o", 64))}
    stored = load_file(path / "model.safetensors") | others
    save_file(stored, path / "model.safetensors")
    edit_json(path / "config.json", lambda config: config.update(attention_bias=True))
    assert {f"{PROJ}.bias", *others} <= set(load_student(path).tensors)


def test_a_v1_zero_point_that_readers_disagree_on(tmp_path: Path) -> None:
    fields = _set("qzeros", lambda tensor: torch.from_numpy(tensor.numpy() | np.int32(0xF)))
    path = _changed(tmp_path, "gptq-4bit", lambda config: config.pop("meta"), fields)
    error = load_refused(path, QuantizationError, f"{PROJ}.qzeros", "readers of v1 disagree")
    assert "gptq_v2" in error.way_out


def test_a_width_whose_packing_is_not_told_by_its_shape(tmp_path: Path) -> None:
    """20 columns of 3 bits take two words packed densely, and two with ten to a word."""
    from exporters.formats.compressed_tensors import PackQuantized

    with raises(QuantizationError, match="same shape packed densely"):
        PackQuantized(3, True, None).check("m", (8, 20))
    PackQuantized(3, True, None).check("m", (8, 64))
