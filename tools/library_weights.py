"""Weights as the formats' own libraries store and dequantise them, for tests where those libraries are not installed.

    python -m tools.library_weights {gptqmodel,autoawq,autoround,torchao,bitsandbytes,bitsandbytes_nf4}

Writes tests/exporters/library_weights/LIBRARY.safetensors: for every case the tensors that the library made,
CASE.expected with its own dequantised weight [N, K], and the quantization_config as JSON in the file's metadata. Run
where the library is installed: GPTQModel 7.7, AutoAWQ 0.2.9 and AutoRound 0.16 ask for other versions of torch or
transformers than constraints.txt has, and bring much along, so they are in no extra; torchao and bitsandbytes are the
extra `formats`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tools import torchao_weights
from tools.make_checkpoints import random_grid

FOLDER = Path(__file__).parent.parent / "tests" / "exporters" / "library_weights"
ROWS, COLUMNS, GROUP = 32, 96, 32
Made = tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]


def _linear(weight: np.ndarray) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    return layer


def gptqmodel() -> Mapping[str, Made]:
    """TorchLinear's packing; v1 by GPTQModel's own conversion; zero points of 0 among the asymmetric ones."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    found: dict[str, Made] = {}
    random = np.random.default_rng(0)
    for bits in (2, 3, 4, 8):
        for version in ("gptq", "gptq_v2"):
            for symmetric in (True, False):
                for act_order in ("", "own"):
                    grid = random_grid(random, (ROWS, COLUMNS), bits, GROUP, symmetric, act_order)
                    zeros = grid.zeros if symmetric else random.integers(0, 1 << bits, grid.zeros.shape)
                    kept = torch.from_numpy(zeros.astype(np.float32)), torch.from_numpy(grid.scales.astype(np.float32))
                    index = torch.from_numpy(grid.index)
                    at = index.long()
                    codes = torch.from_numpy(grid.codes.astype(np.float32))
                    layer = _linear(((codes - kept[0][:, at]) * kept[1][:, at]).numpy())
                    made = TorchLinear(
                        bits=bits, group_size=GROUP, sym=symmetric, desc_act=bool(act_order), in_features=COLUMNS,
                        out_features=ROWS, bias=False, pack_dtype=torch.int32, register_buffers=True,
                    )  # fmt: skip
                    made.pack_original(layer, kept[1], kept[0], index)
                    made.post_init()
                    expected = made.dequantize_weight().T
                    config = {
                        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": bool(act_order),
                        "sym": symmetric, "checkpoint_format": version, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
                    }  # fmt: skip
                    if version == "gptq":
                        convert_gptq_v2_to_v1_format_module(made, QuantizeConfig(bits=bits, group_size=GROUP))
                    parts = {name: getattr(made, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
                    name = f"{version}-{bits}-{'sym' if symmetric else 'zeros'}{'-order' if act_order else ''}"
                    found[name] = parts, expected, config
    return found


def autoawq() -> Mapping[str, Made]:
    """WQLinear_GEMM's packing and dequantize_gemm."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    grid = random_grid(np.random.default_rng(0), (ROWS, COLUMNS), 4, GROUP, False)
    scales = torch.from_numpy(grid.scales.astype(np.float32)).T.contiguous()
    zeros = torch.from_numpy(grid.zeros.astype(np.float32)).T.contiguous()
    made = WQLinear_GEMM.from_linear(_linear(grid.weight()), 4, GROUP, scales=scales, zeros=zeros)
    parts = {name: getattr(made, name).clone() for name in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, GROUP).T
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return {"gemm": (parts, expected, config)}


def autoround() -> Mapping[str, Made]:
    """Both conventions of zero points, packed by AutoRound's own layers and multiplied with the identity."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    found: dict[str, Made] = {}
    random = np.random.default_rng(0)
    for packing, library in (("auto_gptq", qlinear_torch_zp), ("gptqmodel", qlinear_torch)):
        for bits in (2, 3, 4, 8):
            grid = random_grid(random, (ROWS, COLUMNS), bits, GROUP, symmetric=False)
            made = library.QuantLinear(bits, GROUP, COLUMNS, ROWS, bias=False)
            made.device = "cpu"
            scales, zeros = (torch.from_numpy(part.astype(np.float32)) for part in (grid.scales, grid.zeros))
            made.pack(_linear(grid.weight()), scales, zeros, None, device="cpu")
            made.post_init()
            expected = made(torch.eye(COLUMNS, dtype=torch.float16)).T
            config = {
                "quant_method": "auto-round", "bits": bits, "group_size": GROUP, "sym": False, "data_type": "int",
                "packing_format": f"auto_round:{packing}", "autoround_version": "0.16.1",
            }  # fmt: skip
            parts = {name: getattr(made, name).clone() for name in ("qweight", "qzeros", "scales")}
            found[f"{packing}-{bits}"] = parts, expected, config
    return found


def bitsandbytes() -> Mapping[str, Made]:
    """int8_vectorwise_quant of a weight, and its dequantisation."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float16))
    codes, largest, _ = int8_vectorwise_quant(weight)
    parts = {"weight": codes, "SCB": largest.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = int8_vectorwise_dequant(codes, largest.float())
    return {"int8": (parts, expected, {"quant_method": "bitsandbytes", "load_in_8bit": True})}


def bitsandbytes_nf4() -> Mapping[str, Made]:
    """Linear4bit's state and its dequantisation on a CPU; of the nested scales there is more than one block."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found: dict[str, Made] = {}
    for name, rows, nested in (("nf4", 32, False), ("nf4-nested", 150, True)):
        weight = np.random.default_rng(0).standard_normal((rows, 128)).astype(np.float32)
        layer = Linear4bit(128, rows, bias=False, quant_type="nf4", compress_statistics=nested)
        layer.weight.data = torch.from_numpy(weight)
        layer = layer.to("cpu")  # which quantises
        expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        found[name] = dict(layer.state_dict()), expected, config
    return found


LIBRARIES: Mapping[str, Callable[[], Mapping[str, Made]]] = {
    "gptqmodel": gptqmodel,
    "autoawq": autoawq,
    "autoround": autoround,
    "torchao": torchao_weights.torchao,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes_nf4": bitsandbytes_nf4,
}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Store and dequantise weights with a format's own library.")
    parser.add_argument("library", choices=LIBRARIES)
    library = parser.parse_args().library
    tensors, configs = {}, {}
    for case, (parts, expected, config) in LIBRARIES[library]().items():
        tensors |= {f"{case}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        tensors[f"{case}.expected"] = expected.contiguous()
        configs[case] = json.dumps(config)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(tensors, FOLDER / f"{library}.safetensors", metadata=configs)
    print(FOLDER / f"{library}.safetensors", len(configs))


if __name__ == "__main__":
    main()
