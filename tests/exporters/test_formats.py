"""Decoders of the checkpoint formats against what the formats' own libraries made (tools/library_weights.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporters.activations import Activation
from exporters.checkpoint import Checkpoint
from exporters.errors import QuantizationError
from exporters.quantization_config import module_schemes
from exporters.quantized import QuantizedTensor
from tools import make_checkpoints

LIBRARY_WEIGHTS = Path(__file__).parent / "library_weights"


def _library_cases() -> Iterator[object]:
    for path in sorted(LIBRARY_WEIGHTS.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for case in sorted(file.metadata()):
                yield pytest.param(path, case, id=f"{path.stem}-{case}")


def _decoded(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], shape: tuple[int, int]
) -> QuantizedTensor:
    return _decoded_with_input(folder, tensors, config, shape)[0]


def _decoded_with_input(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], shape: tuple[int, int], header: str = ""
) -> tuple[QuantizedTensor, Activation | None]:
    """A file with one linear layer "m", read by its format; every tensor of it must be one that the format names."""
    named = {f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"m.weight": header, "format": "pt"})
    stored = Checkpoint(folder, ["model.safetensors"])
    scheme = module_schemes(config, {"m": ("Linear", "Module")}, stored)["m"]
    scheme.check("m", shape)
    layout = scheme.layout(shape)
    assert set(layout) == set(tensors) - {name.removeprefix("m.") for name in scheme.leftovers("m", stored)}
    for name, (dtypes, shapes) in layout.items():
        info = stored.tensors[f"m.{name}"]
        assert info.dtype in dtypes and info.shape in shapes, name
    return scheme.decode(stored.tensor, "m", shape), scheme.activation(stored.tensor, "m")


@pytest.mark.parametrize(("path", "case"), list(_library_cases()))
def test_weights_are_those_of_the_library_bit_for_bit(path: Path, case: str, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()[case])
        parts = {n.removeprefix(f"{case}."): file.get_tensor(n) for n in file.keys() if n.startswith(f"{case}.")}  # noqa: SIM118
    expected, x, rounded = (parts.pop(name, None) for name in ("expected", "input", "rounded"))
    header = config.pop("header", "")
    found, activation = _decoded_with_input(tmp_path, parts, config, tuple(expected.shape), header)
    # Ours is exact in float32; a library multiplies in the scale's or the weight's type, so one rounding must agree.
    weight = torch.from_numpy(found.dequantize())
    if path.stem == "bitsandbytes_nf4":
        assert torch.equal(weight, expected) and (found.encoding, found.group) == ("nf4", 64)
    elif path.stem == "bitsandbytes":  # it multiplies with SCB, then with 1/127: two roundings, where ours has one
        assert torch.allclose(weight, expected.float(), rtol=2.0**-22, atol=0)
    else:
        assert torch.equal(weight.to(expected.dtype), expected)
    assert np.unique(found.unpack()).size > (1 << found.bits) // 3
    assert (activation is None) == (rounded is None)
    if activation is not None:
        # torchao multiplies by 1/scale: the largest of a row lies on a tie (-127.5) and may fall to its other side.
        steps = ((activation(x) - rounded) / (x.abs().amax(-1, keepdim=True) / 127.5)).abs()
        assert (steps > 0).float().mean() < 2e-3 and steps.max() < 1.001 and not torch.equal(x, rounded)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", ["", "own"])
def test_gptq_of_either_version_is_the_same_tensor(bits: int, act_order: str, tmp_path: Path) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(bits), (32, 96), bits, 32, False, act_order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": bool(act_order)}
    one, two = (
        _decoded(
            tmp_path, make_checkpoints.gptq(grid, bits, version), {**config, "checkpoint_format": version}, (32, 96)
        )
        for version in ("gptq", "gptq_v2")
    )
    for part in ("codes", "scales", "zero_points"):
        assert np.array_equal(getattr(one, part), getattr(two, part)), part
    assert np.array_equal(one.dequantize(), grid.weight())
    assert (one.order is not None) == bool(act_order)
    if one.order is not None:
        assert np.array_equal(grid.index[one.order], np.arange(96) // 32)
        assert np.array_equal(one.unpack(), grid.codes[:, one.order])


def test_a_gptq_file_that_names_no_version_is_v1(tmp_path: Path) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(0), (32, 64), 4, 32, False)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    found = _decoded(tmp_path, make_checkpoints.gptq(grid, 4, "gptq"), config, (32, 64))
    assert found.source == "gptq" and np.array_equal(found.zero_points, grid.zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_v1_zero_point_that_readers_disagree_on_is_refused_unless_the_writer_is_known(
    bits: int, tmp_path: Path
) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(0), (32, 64), bits, 32, False)
    grid.zeros[5, 1] = 0
    tensors = make_checkpoints.gptq(grid, bits, "gptq_v2")
    ones = sum(1 << shift for shift in range(0, 32, bits))
    tensors["qzeros"] = torch.from_numpy((tensors["qzeros"].numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
    with pytest.raises(QuantizationError, match="readers of v1 disagree"):
        _decoded(tmp_path, tensors, config, (32, 64))
    known = {**config, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    assert np.array_equal(_decoded(tmp_path, tensors, known, (32, 64)).zero_points, grid.zeros)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64), (3, -1)])
def test_gptq_groups_that_leave_a_tail(bits: int, group: int, tmp_path: Path) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(0), (32, 96), bits, group, False)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq_v2"}
    found = _decoded(tmp_path, make_checkpoints.gptq(grid, bits, "gptq_v2"), config, (32, 96))
    assert found.scales.shape == grid.scales.shape and np.array_equal(found.dequantize(), grid.weight())


def test_gptqmodels_dynamic_overrides(tmp_path: Path) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(0), (32, 64), 8, 16, True)
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2",
        "dynamic": {"-:other": {}, "+:^m$": {"bits": 8, "group_size": 16}, "m": {"bits": 2}},
    }  # fmt: skip
    found = _decoded(tmp_path, make_checkpoints.gptq(grid, 8, "gptq_v2"), config, (32, 64))
    assert (found.bits, found.group, found.zero_points) == (8, 16, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric", "group"), [(4, False, 32), (3, True, 40), (8, True, -1), (8, False, 32)])
def test_qat_codes_are_found_exactly(
    dtype: torch.dtype, bits: int, symmetric: bool, group: int, tmp_path: Path
) -> None:
    grid = make_checkpoints.random_grid(np.random.default_rng(0), (16, 96), bits, group, symmetric)
    tensors = make_checkpoints.qat(grid, symmetric)
    tensors["weight"] = tensors["weight"].to(dtype)
    config = {"quant_method": "edge-qat", "version": 1, "bits": bits, "group_size": group, "symmetric": symmetric}
    if bits == 8 and dtype == torch.bfloat16 and not symmetric:
        with pytest.raises(QuantizationError, match="those of two codes in torch"):
            _decoded(tmp_path, tensors, config, (16, 96))
        return
    found = _decoded(tmp_path, tensors, config, (16, 96))
    assert np.array_equal(found.unpack(), grid.codes)
    if not symmetric:
        assert np.array_equal(found.zero_points, grid.zeros)
    off = tensors["weight"].clone()
    off[3, 7] += grid.scales[3, 0].item() / 3
    with pytest.raises(QuantizationError, match=r"1 of 1536 weights are off the grid, the first one \[3, 7\]"):
        _decoded(tmp_path, {**tensors, "weight": off}, config, (16, 96))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "group"), [(37, 8), (96, 40), (5, 5)])
def test_words_are_a_stream_of_bits(bits: int, columns: int, group: int) -> None:
    from exporters.formats.scheme import unpack_words

    codes = np.random.default_rng(0).integers(0, 1 << bits, (columns, 3)).astype(np.uint8)
    words = make_checkpoints.pack(codes, bits)
    assert np.array_equal(unpack_words(words.T, bits, columns, "here"), codes.T)
    if columns * bits % 32:
        words[-1, 1] |= np.int32(-(1 << 31))
        with pytest.raises(QuantizationError, match=f"beyond column {columns}"):
            unpack_words(words.T, bits, columns, "here")
