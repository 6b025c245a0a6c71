"""A folder of small checkpoints, one for every way in which a format stores integers; nothing is downloaded.

    python -m tools.make_checkpoints FOLDER [--only NAME]

Each is a plain transformers folder: a Llama of one layer, hidden size 64, with random codes, scales and zero points, so
that every value of a code occurs. compressed-tensors' are written by that library. The others' are written here from
the formats' documentation, element by element; that these are the tensors that GPTQModel, AutoAWQ, torchao and
bitsandbytes write is shown by what those libraries made (tools/library_weights.py, tests/exporters/library_weights).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tools import float_checkpoints, torchao_checkpoints

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
GROUP = 32
LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 96,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Random integers of one weight: codes uint8 [N, K], zero points [N, G], scales float16 [N, G], g_idx int32 [K]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    index: np.ndarray

    def weight(self) -> np.ndarray:
        """float32 [N, K], column by column in natural order."""
        rows, columns = self.codes.shape
        values = np.empty((rows, columns), np.float32)
        for k in range(columns):
            at = self.index[k]
            difference = self.codes[:, k].astype(np.int32) - self.zeros[:, at].astype(np.int32)
            values[:, k] = difference.astype(np.float32) * self.scales[:, at].astype(np.float32)
        return values


def random_grid(
    random: np.random.Generator, shape: tuple[int, int], bits: int, group: int, symmetric: bool, act_order: str = ""
) -> Grid:
    """Random integers of a weight.

    Args:
        group: columns of a scale, -1 for all.
        act_order: "" for none, "shared" or "own" for a permutation that the weights of one K share or not.
    """
    rows, columns = shape
    size = columns if group == -1 else group
    groups = -(-columns // size)
    index = np.arange(columns) // size
    if act_order:
        index = index[
            np.random.default_rng(columns if act_order == "shared" else random.integers(1 << 30)).permutation(columns)
        ]
    middle = 1 << (bits - 1)
    zeros = np.full((rows, groups), middle) if symmetric else random.integers(1, 1 << bits, (rows, groups))
    # Small enough that the model's values stay in range whatever the width.
    scales = (random.random((rows, groups)) + 0.5) * 2.0 ** -(bits + 2)
    return Grid(
        random.integers(0, 1 << bits, shape).astype(np.uint8),
        zeros.astype(np.uint8),
        scales.astype(np.float16),
        index.astype(np.int32),
    )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 [ceil(R*bits/32), C] of integers [R, C]: each column a stream of bits along R, low bits first."""
    rows, columns = values.shape
    words = np.zeros((-(-rows * bits // 32), columns), np.uint64)
    for row in range(rows):
        at, shift = divmod(row * bits, 32)
        value = values[row].astype(np.uint64) << np.uint64(shift)
        words[at] |= value & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[at + 1] |= value >> np.uint64(32)
    return words.astype(np.uint32).view(np.int32)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def gptq(grid: Grid, bits: int, version: str) -> Tensors:
    """GPTQ's tensors of a weight; v1 zero points are one less."""
    less = 1 if version == "gptq" else 0
    return {
        "qweight": _tensor(pack(grid.codes.T, bits)),
        "qzeros": _tensor(pack((grid.zeros - less).astype(np.uint8), bits).T),
        "scales": _tensor(grid.scales.T),
        "g_idx": _tensor(grid.index),
    }


def autoround(grid: Grid) -> Tensors:
    """AutoRound's tensors of a weight packed as auto_gptq: those of GPTQ without g_idx."""
    return {name: part for name, part in gptq(grid, 4, "gptq").items() if name != "g_idx"}


def awq(grid: Grid) -> Tensors:
    """AWQ's tensors of a weight: eight columns to a word, in its order."""

    def words(values: np.ndarray) -> torch.Tensor:
        found = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for field, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            found |= values[:, column::8].astype(np.uint32) << np.uint32(4 * field)
        return _tensor(found.view(np.int32))

    return {"qweight": words(grid.codes.T), "qzeros": words(grid.zeros.T), "scales": _tensor(grid.scales.T)}


def bitsandbytes(grid: Grid) -> tuple[Tensors, np.ndarray]:
    """LLM.int8's tensors of a weight, and the weight itself."""
    signed = np.maximum(grid.codes.astype(np.int16) - 128, -127).astype(np.int8)
    largest = (127 * grid.scales[:, 0].astype(np.float64)).astype(np.float32)
    tensors = {"weight": _tensor(signed), "SCB": _tensor(largest), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    scales = (largest.astype(np.float64) / 127).astype(np.float32)
    return tensors, signed.astype(np.float32) * scales[:, None]


def qat(grid: Grid, symmetric: bool) -> Tensors:
    """Our QAT export of a weight."""
    tensors = {"weight": _tensor(grid.weight()), "weight_scale": _tensor(grid.scales)}
    return tensors if symmetric else {**tensors, "weight_zero_point": _tensor(grid.zeros)}


def compressed(grid: Grid, form: str, bits: int, group: int, symmetric: bool) -> Tensors:
    """A weight as the compressed-tensors library itself compresses it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    library = QuantizationScheme.model_validate(
        {"targets": ["Linear"], "format": form, "weights": _compressed_weights(bits, group, symmetric)}
    )
    # The library's zero points count from the middle.
    state = {
        "weight": _tensor(grid.weight()),
        "weight_scale": _tensor(grid.scales.astype(np.float32)),
        "weight_zero_point": torchao_checkpoints.signed(grid.zeros, bits),
    }
    stored = BaseCompressor.get_value_from_registry(form).compress(state, library)
    return {name: tensor.contiguous() for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}


def _compressed_weights(bits: int, group: int, symmetric: bool) -> Config:
    return {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "channel" if group == -1 else "group", "group_size": None if group == -1 else group,
    }  # fmt: skip


def compressed_with_order(grid: Grid, bits: int) -> Tensors:
    """pack-quantized with weight_g_idx, which the library wrote before 0.20."""
    words = pack(grid.codes.T, bits).T
    return {
        "weight_packed": _tensor(words),
        "weight_scale": _tensor(grid.scales),
        "weight_shape": torch.tensor(grid.codes.shape),
        "weight_zero_point": _tensor(pack(grid.zeros, bits)),
        "weight_g_idx": _tensor(grid.index),
    }


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        format: row of the README's matrix.
        config: quantization_config.
        make: (random numbers, shape [N, K]) -> tensors of a linear layer by local name, and its weight float32 [N, K].
        header: K -> what the file's header says of a weight, or None.
    """

    format: str
    config: Config
    make: Callable[[np.random.Generator, tuple[int, int]], tuple[Tensors, np.ndarray]]
    header: Callable[[int], str] | None = None


def _of(store: Callable[[Grid], Tensors], bits: int, group: int, symmetric: bool, act_order: str = "") -> Any:
    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        grid = random_grid(random, shape, bits, group, symmetric, act_order)
        return store(grid), grid.weight()

    return make


def _gptq(name: str, bits: int, version: str, symmetric: bool, act_order: str = "", group: int = GROUP) -> Case:
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": bool(act_order), "sym": symmetric,
        "checkpoint_format": version, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    return Case(name, config, _of(lambda grid: gptq(grid, bits, version), bits, group, symmetric, act_order))


def _compressed(name: str, form: str, bits: int, group: int, symmetric: bool) -> Case:
    store = lambda grid: compressed(grid, form, bits, group, symmetric)  # noqa: E731
    return Case(
        name, _compressed_config(form, _compressed_weights(bits, group, symmetric)), _of(store, bits, group, symmetric)
    )


def _compressed_config(form: str, weights: Config) -> Config:
    return {
        "quant_method": "compressed-tensors", "version": "0.20.0", "quantization_status": "compressed", "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip


def _torchao(name: str, bits: int, symmetric: bool) -> Case:
    group = -1 if bits == 8 else GROUP
    make = _of(lambda grid: torchao_checkpoints.integers(grid, bits), bits, group, symmetric)
    return Case(name, {"quant_method": "torchao"}, make, lambda columns: torchao_checkpoints.header(bits, columns))


def _torchao_float(name: str, kind: str) -> Case:
    make, header = torchao_checkpoints.FLOATS[kind]
    return Case(name, {"quant_method": "torchao"}, make, header)


def _qat(name: str, bits: int, symmetric: bool, group: int = GROUP) -> Case:
    config = {"quant_method": "edge-qat", "version": 1, "bits": bits, "group_size": group, "symmetric": symmetric}
    return Case(name, config, _of(lambda grid: qat(grid, symmetric), bits, group, symmetric))


def _float(name: str, form: str, weights: Config, make: Callable[..., tuple[Tensors, np.ndarray]]) -> Case:
    return Case(name, _compressed_config(form, weights), make)


def _bitsandbytes(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
    return bitsandbytes(random_grid(random, shape, 8, -1, True))


_ORDERED = _compressed_config("pack-quantized", {**_compressed_weights(4, GROUP, False), "actorder": "group"})
_BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True}
_AUTOROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}  # fmt: skip
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}

_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_FLOAT = {"type": "float", "symmetric": True, "dynamic": False}
FP8_CHANNEL = {**_FLOAT, "num_bits": 8, "strategy": "channel"}
FP8_BLOCKS = {**_FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [float_checkpoints.BLOCK] * 2}
NVFP4 = {**_FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
MXFP4 = {**_FLOAT, "num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}

_PACK, _INT = ("pack-quantized", "int-quantized")

#: name of the folder -> the checkpoint in it
CASES: Mapping[str, Case] = {
    "gptq-4bit": _gptq("GPTQ v1, 4 bits", 4, "gptq", True),
    "gptq-4bit-zeros": _gptq("GPTQ v1, 4 bits, zero points", 4, "gptq", False),
    "gptq-v2-4bit-zeros": _gptq("GPTQ v2, 4 bits, zero points", 4, "gptq_v2", False),
    "gptq-4bit-act-order": _gptq("GPTQ, 4 bits, act-order", 4, "gptq_v2", False, "shared"),
    "gptq-4bit-own-orders": _gptq("GPTQ, 4 bits, an act-order of each matrix", 4, "gptq_v2", True, "own"),
    "gptq-2bit": _gptq("GPTQ, 2 bits", 2, "gptq_v2", False),
    "gptq-3bit": _gptq("GPTQ, 3 bits", 3, "gptq_v2", False),
    "gptq-8bit": _gptq("GPTQ, 8 bits", 8, "gptq", True),
    "gptq-4bit-tail": _gptq("GPTQ, 4 bits, groups with a tail", 4, "gptq_v2", False, group=64),
    "gptq-4bit-channel": _gptq("GPTQ, 4 bits per channel", 4, "gptq_v2", False, group=-1),
    "awq-4bit": Case("AWQ (gemm), 4 bits", _AWQ, _of(awq, 4, GROUP, False)),
    "autoround-4bit": Case("AutoRound, 4 bits, zero points", _AUTOROUND, _of(autoround, 4, GROUP, False)),
    "pack-2bit": _compressed(f"{_PACK}, 2 bits", _PACK, 2, GROUP, True),
    "pack-3bit": _compressed(f"{_PACK}, 3 bits, zero points", _PACK, 3, GROUP, False),
    "pack-4bit": _compressed(f"{_PACK}, 4 bits", _PACK, 4, GROUP, True),
    "pack-4bit-zeros": _compressed(f"{_PACK}, 4 bits, zero points", _PACK, 4, GROUP, False),
    "pack-4bit-act-order": Case(
        f"{_PACK}, 4 bits, act-order",
        _ORDERED,
        _of(lambda grid: compressed_with_order(grid, 4), 4, GROUP, False, "shared"),
    ),
    "pack-8bit": _compressed(f"{_PACK}, 8 bits", _PACK, 8, GROUP, True),
    "int-8bit-channel": _compressed(f"{_INT}, 8 bits per channel", _INT, 8, -1, True),
    "torchao-int8": _torchao("torchao int8", 8, True),
    "torchao-int4": _torchao("torchao intx, 4 bits, zero points", 4, False),
    "torchao-int3": _torchao("torchao intx, 3 bits", 3, True),
    "torchao-fp8": _torchao_float("torchao fp8 per row", "fp8"),
    "torchao-mxfp8": _torchao_float("torchao mxfp8", "mxfp8"),
    "torchao-nvfp4": _torchao_float("torchao nvfp4", "nvfp4"),
    "bitsandbytes-int8": Case("bitsandbytes int8", _BITSANDBYTES, _bitsandbytes),
    "fp8-channel": _float(
        "float-quantized, fp8 per channel", "float-quantized", FP8_CHANNEL, float_checkpoints.fp8_channel
    ),
    "fp8-blocks": _float("float-quantized, fp8 in blocks", "float-quantized", FP8_BLOCKS, float_checkpoints.fp8_blocks),
    "nvfp4": _float("nvfp4-pack-quantized", "nvfp4-pack-quantized", NVFP4, float_checkpoints.nvfp4),
    "mxfp4": _float("mxfp4-pack-quantized", "mxfp4-pack-quantized", MXFP4, float_checkpoints.mxfp4),
    "bitsandbytes-nf4": Case("bitsandbytes nf4", _NF4, float_checkpoints.nf4),
    "qat-4bit": _qat("edge-qat, 4 bits, zero points", 4, False),
    "qat-8bit-channel": _qat("edge-qat, 8 bits per channel", 8, True, -1),
}


def write(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Writes one checkpoint into a new folder.

    Returns:
        weight of every linear layer of the decoder by module, float32 [N, K]: what its codes stand for.
    """
    from exporters.model_config import skeleton

    case = CASES[name]
    random = np.random.default_rng(sum(map(ord, name)))
    stored: Tensors = {}
    header, weights = {"format": "pt"}, {}
    for parameter, shape in skeleton(LLAMA).parameters.items():
        module = parameter.removesuffix(".weight")
        if module.endswith("_proj"):
            tensors, weights[module] = case.make(random, (shape[0], shape[1]))
            stored |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
            if case.header is not None:
                header[parameter] = case.header(shape[1])
        elif len(shape) == 1:
            stored[parameter] = _tensor((1 + 0.1 * random.standard_normal(shape)).astype(np.float32))
        else:
            stored[parameter] = _tensor((random.standard_normal(shape) / 8).astype(np.float32))
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata=header)
    config = json.dumps({**LLAMA, "quantization_config": case.config}, indent=1)
    (folder / "config.json").write_text(config + "\n", "utf-8")
    return weights


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write small checkpoints of every format.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    args = parser.parse_args()
    for name in args.only or CASES:
        write(args.folder / name, name)
        print(args.folder / name)


if __name__ == "__main__":
    main()
