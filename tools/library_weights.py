"""Weights as the formats' own libraries store and dequantise them, for tests where those libraries are not installed.

    python -m tools.library_weights {gptqmodel,autoawq,torchao,bitsandbytes}

Writes tests/exporters/library_weights/LIBRARY.safetensors: for every case the tensors that the library made,
CASE.expected with its own dequantised weight [N, K], and the quantization_config as JSON in the file's metadata. Run
where the library is installed: GPTQModel 7.7 and AutoAWQ 0.2.9 ask for other versions of torch or transformers than
constraints.txt has, and bring much along, so they are in no extra; torchao and bitsandbytes are the extra `formats`.
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


def torchao() -> Mapping[str, Made]:
    """quantize_ of a linear layer, stored by torchao's own flattening for safetensors."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    configs = {"int8": Int8WeightOnlyConfig()}
    for bits in range(2, 9):
        for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
            configs[f"intx-{bits}-{mapping.name.lower()}"] = IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), mapping_type=mapping
            )
    found: dict[str, Made] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
        quantize_(model, config)
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        parts = {key.removeprefix("0."): tensor.contiguous() for key, tensor in tensors.items()}
        expected = model[0].weight.dequantize().detach()
        found[name] = parts, expected, {"quant_method": "torchao", "header": metadata["0.weight"]}
    return found


def bitsandbytes() -> Mapping[str, Made]:
    """int8_vectorwise_quant of a weight, and its dequantisation."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float16)
    codes, largest, _ = int8_vectorwise_quant(weight)
    parts = {"weight": codes, "SCB": largest.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = int8_vectorwise_dequant(codes, largest.float())
    return {"int8": (parts, expected, {"quant_method": "bitsandbytes", "load_in_8bit": True})}


LIBRARIES: Mapping[str, Callable[[], Mapping[str, Made]]] = {
    "gptqmodel": gptqmodel,
    "autoawq": autoawq,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
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
