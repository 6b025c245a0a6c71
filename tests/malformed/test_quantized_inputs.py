"""BAD_INPUTS, row Quantised checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import QuantizationMethod

from exporters.errors import QuantizationError, WeightsError
from exporters.formats import METHODS
from exporters.formats.refused import REFUSED
from exporters.student import load_student
from tests.conftest import MakeStudent
from tests.malformed.packages import copy_package, edit_json, load_refused, relist
from tests.refusals import raises

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
PROJ = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], object]


def _config(package: Path, change: Change) -> Path:
    edit_json(package / "config.json", lambda config: change(config["quantization_config"]))
    return relist(package)


def _tensors(package: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the first shard's tensors; the index follows."""
    tensors = load_file(package / SHARD)
    before = set(tensors)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, package / SHARD)

    def place(index: dict[str, Any]) -> None:
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(set(tensors) - before, SHARD))

    edit_json(package / INDEX, place)
    return relist(package)


@pytest.mark.parametrize("method", ["gtpq", "", None, 4, ["compressed-tensors"]])
def test_an_unknown_method_lists_the_supported(package: Path, method: object) -> None:
    _config(package, lambda config: config.update(quant_method=method))
    error = load_refused(package, QuantizationError, "quant_method", repr(method), "compressed-tensors")
    assert "pack-quantized" in error.way_out
    assert "int-quantized" in error.way_out


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_a_method_that_is_not_read_says_why(package: Path, method: str) -> None:
    _config(package, lambda config: config.update(quant_method=method))
    error = load_refused(package, QuantizationError, "quantization_config.quant_method", repr(method), REFUSED[method])
    assert "--quantise" in error.way_out


def test_no_method_of_transformers_is_forgotten() -> None:
    assert {method.value for method in QuantizationMethod} <= {*METHODS, *REFUSED}


def test_a_method_is_never_guessed(package: Path) -> None:
    load_refused(_config(package, lambda config: config.pop("quant_method")), QuantizationError, "quant_method None")


@pytest.mark.parametrize("version", ["1.0.0", "2", "", 0.2, "latest"])
def test_an_unknown_version(package: Path, version: object) -> None:
    load_refused(_config(package, lambda config: config.update(version=version)), QuantizationError, "version")


@pytest.mark.parametrize("value", [5, [], "compressed-tensors", True])
def test_a_quantization_config_that_is_not_an_object(package: Path, value: object) -> None:
    edit_json(package / "config.json", lambda config: config.update(quantization_config=value))
    load_refused(relist(package), QuantizationError, "quantization_config")


UNSUPPORTED: list[tuple[str, Change, str]] = [
    ("status", lambda c: c.update(quantization_status="frozen"), "frozen"),
    ("kv cache", lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    ("transform", lambda c: c.update(transform_config={"config_groups": {"u": 1}}), "transform_config"),
    ("sparsity", lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    ("no groups", lambda c: c.update(config_groups={}), "config_groups"),
    ("groups as list", lambda c: c.update(config_groups=[]), "config_groups"),
    ("preset", lambda c: c["config_groups"].update(W4A16=["Linear"]), "W4A16"),
    ("no weights", lambda c: c["config_groups"]["group_0"].pop("weights"), "no weights"),
    ("no targets", lambda c: c["config_groups"]["group_0"].update(targets=5), "targets"),
    ("ignore", lambda c: c.update(ignore=[5]), "ignore"),
    ("activations", lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 16}), "16 bits"),
    ("outputs", lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), "activations"),
    ("format", lambda c: c["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"), "nvfp4"),
    ("no format", lambda c: c["config_groups"]["group_0"].pop("format"), "format None"),
]
WEIGHTS: list[tuple[str, dict[str, Any], str]] = [
    ("float", {"type": "float"}, "'float'"),
    ("1 bit", {"num_bits": 1}, "1 bits"),
    ("16 bits", {"num_bits": 16}, "16 bits"),
    ("bits as text", {"num_bits": "4"}, "'4' bits"),
    ("zero-point convention", {"symmetric": None}, "symmetric"),
    ("dynamic", {"dynamic": True}, "dynamic"),
    ("act-order", {"actorder": "group", "strategy": "channel", "group_size": None}, "actorder"),
    ("block", {"strategy": "block", "block_structure": [128, 128]}, "block"),
    ("tensor group", {"strategy": "tensor_group"}, "tensor_group"),
    ("group of zero", {"group_size": 0}, "group_size"),
    ("group as text", {"group_size": "32"}, "group_size"),
    ("per tensor", {"strategy": "tensor", "group_size": None}, "per-tensor"),
]


@pytest.mark.parametrize(("change", "word"), [row[1:] for row in UNSUPPORTED], ids=[row[0] for row in UNSUPPORTED])
def test_a_scheme_that_is_not_carried_over(package: Path, change: Change, word: str) -> None:
    load_refused(_config(package, change), QuantizationError, "quantization_config", word)


@pytest.mark.parametrize(("change", "word"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_weight_arguments_that_are_not_carried_over(package: Path, change: dict[str, Any], word: str) -> None:
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].update(change))
    load_refused(package, QuantizationError, "config_groups.group_0", word)


def test_a_zero_point_convention_that_is_not_stated(package: Path) -> None:
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].pop("symmetric"))
    load_refused(package, QuantizationError, "does not state", "symmetric")


@pytest.mark.parametrize(
    "pattern", ["re:(a+)+$", "re:(.*)*x", "re:" + "a?" * 60, "re:" + "(a|aa)" * 30, r"re:(.)\1", "re:("]
)
@pytest.mark.parametrize("where", ["targets", "ignore"])
def test_a_pattern_that_could_never_end_is_not_tried(package: Path, pattern: str, where: str) -> None:
    def change(config: dict[str, Any]) -> None:
        place = config if where == "ignore" else config["config_groups"]["group_0"]
        place[where] = [pattern]

    start = time.monotonic()
    load_refused(_config(package, change), QuantizationError, where, "pattern")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("group", [48, 7, 128, 10**9])
def test_a_group_that_does_not_divide_k(package: Path, group: int) -> None:
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].update(group_size=group))
    load_refused(package, QuantizationError, f"group_size {group} does not divide K")


@pytest.mark.parametrize("group", [16, 64])
def test_a_group_that_the_scales_do_not_have(package: Path, group: int) -> None:
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].update(group_size=group))
    load_refused(package, WeightsError, "weight_scale")


def test_bits_that_the_packed_shape_does_not_have(package: Path) -> None:
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=8))
    load_refused(package, WeightsError, "weight_packed", "[64, 8]", "[64, 16]")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_part_that_is_missing(package: Path, part: str) -> None:
    load_refused(_tensors(package, lambda t: t.pop(f"{PROJ}.{part}")), WeightsError, f"{PROJ}.{part}", "missing")


PARTS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("weight_packed", lambda t: t[:, :-1]),
    ("weight_packed", lambda t: t[:-1]),
    ("weight_packed", lambda t: t.long()),
    ("weight_packed", lambda t: t.flatten()),
    ("weight_scale", lambda t: t[:, :1]),
    ("weight_scale", lambda t: t.T.repeat(1, 2)),
    ("weight_scale", lambda t: t.double()),
    ("weight_zero_point", lambda t: t[:-1]),
    ("weight_zero_point", lambda t: torch.zeros(64, 2, dtype=torch.int8)),
    ("weight_shape", lambda t: t[:1]),
]


@pytest.mark.parametrize(("part", "change"), PARTS)
def test_a_part_of_the_wrong_shape_or_dtype(
    package: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    name = f"{PROJ}.{part}"
    _tensors(package, lambda tensors: tensors.update({name: change(tensors[name])}))
    load_refused(package, WeightsError, name)


def test_a_stated_shape_that_is_another(package: Path) -> None:
    name = f"{PROJ}.weight_shape"
    _tensors(package, lambda tensors: tensors.update({name: torch.tensor([64, 63])}))
    load_refused(package, QuantizationError, name, "(64, 63)")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({5: 3}, "there are 2"),
        ({5: -1}, "there are 2"),
        ({5: 1}, "31 features into group 0"),
        ({5: 1, 40: 0}, "actorder"),
    ],
)
def test_group_indices(package: Path, values: dict[int, int], word: str) -> None:
    name = f"{PROJ}.weight_g_idx"
    index = torch.arange(64, dtype=torch.int32) // 32
    for at, group in values.items():
        index[at] = group
    load_refused(_tensors(package, lambda tensors: tensors.update({name: index})), QuantizationError, name, word)


def test_symmetric_weights_with_zero_points(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    package = copy_package(make_tiny_student(variant="int8"), tmp_path / "package")
    name = f"{PROJ}.weight_zero_point"
    # Older writers keep zero points of nothing but zeros: the same weights, so they are passed over.
    _tensors(package, lambda tensors: tensors.update({name: torch.zeros(64, 1, dtype=torch.int8)}))
    assert load_student(package).quantized[PROJ].zero_points is None
    _tensors(package, lambda tensors: tensors.update({name: torch.ones(64, 1, dtype=torch.int8)}))
    load_refused(package, QuantizationError, name, "symmetric")


def test_a_module_stored_both_ways(package: Path) -> None:
    name = f"{PROJ}.weight"
    _tensors(package, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    load_refused(package, WeightsError, name, "does not have")


def test_a_module_that_no_group_targets(package: Path) -> None:
    _config(package, lambda config: config.update(ignore=["lm_head", PROJ]))
    load_refused(package, WeightsError, f"{PROJ}.weight", "missing")


def test_values_past_their_bits(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    package = copy_package(make_tiny_student(variant="int8"), tmp_path / "package")
    _config(package, lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=4))
    load_refused(package, QuantizationError, "outside 4 bits")


def test_bits_beyond_the_last_column(tmp_path: Path) -> None:
    from exporters.formats.compressed_tensors import PackQuantized

    packed = torch.zeros(2, 2, dtype=torch.int32)
    state = {
        "m.weight_packed": packed, "m.weight_scale": torch.ones(2, 1), "m.weight_shape": torch.tensor([2, 9]),
    }  # fmt: skip
    decode = PackQuantized(4, True, None).decode
    assert decode(state.__getitem__, "m", (2, 9)).shape == (2, 9)
    for bit in (4, 8, 31):
        packed.zero_()
        packed[1, 1] = 1 << bit if bit < 31 else -(1 << 31)
        with raises(QuantizationError, match="beyond column 9"):
            decode(state.__getitem__, "m", (2, 9))
