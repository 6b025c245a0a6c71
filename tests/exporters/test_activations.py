"""Rounded activations against compressed-tensors' own functions, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from exporters.activations import Activation
from exporters.ops.quantize_activation import FORMATS, _rounded

E4M3 = torch.float8_e4m3fn
DYNAMIC: dict[str, tuple[Activation, dict[str, Any]]] = {
    "int8-token": (Activation("int8"), dict(num_bits=8, strategy="token")),
    "int8-token-zeros": (Activation("int8", symmetric=False), dict(num_bits=8, strategy="token", symmetric=False)),
    "int8-group": (Activation("int8", 16), dict(num_bits=8, strategy="group", group_size=16)),
    "int4-token": (Activation("int4"), dict(num_bits=4, strategy="token")),
    "fp8-token": (Activation("float8_e4m3fn"), dict(num_bits=8, type="float", strategy="token")),
    "fp8-group": (Activation("float8_e4m3fn", 16), dict(num_bits=8, type="float", strategy="group", group_size=16)),
}
STATIC: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "int8": ("int8", True, 0, dict(num_bits=8)),
    "int8-zeros": ("int8", False, -7, dict(num_bits=8, symmetric=False)),
    "fp8": ("float8_e4m3fn", True, 0, dict(num_bits=8, type="float")),
}


def rows() -> torch.Tensor:
    """[2, 301, 64]: rows of all sizes, some without a value, some of one sign, some whose largest is negative."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 301, 64, generator=random) * torch.logspace(-6, 4, 301)[:, None]
    x[0, :20] = -x[0, :20].abs()
    x[1, :20] = x[1, :20].abs()
    x[:, 40] = 0
    return x


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    np.testing.assert_array_equal(got.numpy(), wanted.numpy())
    assert not torch.equal(got, rows())


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic(name: str) -> None:
    activation, options = DYNAMIC[name]
    args = QuantizationArgs(dynamic=True, **options)
    scale, zero = compute_dynamic_scales_and_zp(rows(), args, torch.nn.Module())
    same(activation(rows()), fake_quantize(rows(), scale, zero, args))
    assert torch.equal(activation(rows()), activation.reference(rows()))


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("scale", [0.037, 1.7e-4, 11.3])
def test_static(name: str, scale: float) -> None:
    encoding, symmetric, zero, options = STATIC[name]
    held = torch.tensor([scale])
    args = QuantizationArgs(strategy="tensor", **options)
    wanted = fake_quantize(rows(), held, torch.tensor([zero]), args)
    same(Activation(encoding, symmetric=symmetric, scale=held.item(), zero_point=zero)(rows()), wanted)


@pytest.mark.parametrize("scale", [1.0, 733.25])
def test_groups_below_a_global_scale(scale: float) -> None:
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local",
                            scale_dtype=E4M3)  # fmt: skip
    held = torch.tensor([scale])
    x = rows()[:, 100:160]
    by, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=held)
    got = Activation("float4_e2m1fn", 16, global_scale=scale)(x)
    np.testing.assert_array_equal(got.numpy(), fake_quantize(x, by, zero, args, global_scale=held).numpy())


def test_rounding_to_fp8_is_the_cast() -> None:
    """Every value, what lies between two, and the float32 numbers beside that."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, toward)) for toward in (-1e9, 1e9)]
    random = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 100
    x = torch.cat([values, middles, *near, random.clamp(-448, 448)])
    assert torch.equal(_rounded(x, FORMATS["float8_e4m3fn"]), x.to(E4M3).float())


def test_in_double_precision_nothing_is_rounded_to_float32() -> None:
    x = rows().double()
    y = Activation("int8").reference(x)
    assert y.dtype is torch.float64
    assert not torch.equal(y, Activation("int8").reference(x.float()).double())


@pytest.mark.parametrize(
    ("activation", "text"),
    [
        (Activation("int8"), "int8 per token"),
        (Activation("float8_e4m3fn", 128), "float8_e4m3fn per 128 columns"),
        (Activation("int8", scale=0.1), "int8 static"),
    ],
)
def test_in_words(activation: Activation, text: str) -> None:
    assert str(activation) == text
