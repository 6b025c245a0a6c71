"""Weights as torchao stores and dequantises them, and inputs as it rounds them, for tools/library_weights.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Made = tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]
ROWS, COLUMNS, GROUP = 32, 96, 32


def _configs() -> Mapping[str, Any]:
    """Case -> what quantize_ is told."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8StaticActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerTensor,
    )

    static = dict(act_quant_scale=torch.tensor([[0.0173]]), granularity=PerTensor())
    asymmetric = dict(act_mapping_type=MappingType.ASYMMETRIC)
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int8-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
        "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
        "int8-dynamic-zeros": Int8DynamicActivationInt8WeightConfig(**asymmetric),
        "int8-static": Int8StaticActivationInt8WeightConfig(**static),
        "int8-static-zeros": Int8StaticActivationInt8WeightConfig(
            **static, **asymmetric, act_quant_zero_point=torch.tensor([[-9]], dtype=torch.int8)
        ),
        "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)),
        "intx-4-channel": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
        "float8": Float8WeightOnlyConfig(),
        "float8-e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "nvfp4": NVFP4WeightOnlyConfig(),
        "nvfp4-one-level": NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False),
    }
    for bits in range(1, 9):
        for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
            configs[f"intx-{bits}-{mapping.name.lower()}"] = IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), mapping_type=mapping
            )
    del configs["intx-1-symmetric"]  # all of its codes are 0
    return configs


def _tensors() -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Case -> what makes the weight, where quantize_ asks for a GPU though nothing that is stored depends on it."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    def float8(weight: Any, inputs: Any = None) -> Callable[[torch.Tensor], torch.Tensor]:
        kwargs = None if inputs is None else QuantizeTensorToFloat8Kwargs(granularity=inputs)
        return lambda tensor: Float8Tensor.from_hp(tensor, granularity=weight, act_quant_kwargs=kwargs)

    def mx(element: Any, swizzled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: MXTensor.to_mx(tensor, element, is_swizzled_scales=swizzled)

    return {
        "float8-tensor": float8(PerTensor()),
        "float8-blocks": float8(PerBlock([16, 32])),
        "float8-dynamic": float8(PerRow(), PerRow()),
        "float8-dynamic-blocks": float8(PerBlock([32, 32]), PerBlock([1, 32])),
        "mxfp8": mx(torch.float8_e4m3fn, True),
        "mxfp8-e5m2": mx(torch.float8_e5m2, False),
        "mxfp4": mx(torch.float4_e2m1fn_x2, True),
        "nvfp4-rows": lambda tensor: NVFP4Tensor.to_nvfp4(tensor, is_swizzled_scales=False),
    }


def _rounded(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """``x`` as the layer of ``weight`` rounds it, None where it does not."""
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor

    if getattr(weight, "activation_quantization", None) is not None:
        return intx_unpacked_to_int8_tensor._apply_int8_act_asym_per_token_quant_dequant(x)
    if (kwargs := getattr(weight, "act_quant_kwargs", None)) is None:
        return None
    given = [getattr(weight, f"act_quant_{part}", None) for part in ("scale", "zero_point")]
    return _choose_quant_func_and_quantize_tensor(x, kwargs, *given).dequantize()


def torchao() -> Mapping[str, Made]:
    """Linear layers, quantised and stored by torchao's own flattening for safetensors.

    Beside a weight's parts: ``input`` [16, K] and ``rounded``, where the layer rounds its input.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    makers: dict[str, Callable[[torch.nn.Sequential], None]] = {}
    for name, config in _configs().items():
        makers[name] = lambda model, config=config: quantize_(model, config)
    for name, make in _tensors().items():
        makers[name] = lambda model, make=make: setattr(
            model[0], "weight", torch.nn.Parameter(make(model[0].weight.detach()), requires_grad=False)
        )
    found: dict[str, Made] = {}
    for name, make in makers.items():
        random = np.random.default_rng(0)
        model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
        power = 5 if "fp" in name or "float" in name else 1  # of all sizes, so that most codes of a float occur
        model[0].weight.data = torch.from_numpy((random.standard_normal((ROWS, COLUMNS)) ** power).astype(np.float32))
        make(model)
        weight = model[0].weight.detach()
        tensors, metadata = flatten_tensor_state_dict({"0.weight": weight})
        parts = {key.removeprefix("0."): tensor.contiguous() for key, tensor in tensors.items()}
        x = torch.from_numpy((random.standard_normal((16, COLUMNS)) * np.logspace(-3, 2, 16)[:, None]).astype("f4"))
        if (rounded := _rounded(weight, x)) is not None:
            parts |= {"input": x, "rounded": rounded}
        found[name] = parts, weight.dequantize(), {"quant_method": "torchao", "header": metadata["0.weight"]}
    return found
