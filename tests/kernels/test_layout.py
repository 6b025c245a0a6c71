"""Packed weights give back what went in, bit for bit, and the kernels are clean under the sanitizers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exporters import cpu_layout
from tests.kernels import calls
from tests.kernels.test_conv import CONVS, call, sums, tensors
from tests.kernels.test_fused_ops import MATRICES, assert_near, check_attention, op_cases, weights
from tools.kernel_library import Program, build, is_native, runs_here


@pytest.mark.parametrize(("bits", "zeros"), list(itertools.product((2, 4, 8), (False, True))))
@pytest.mark.parametrize(("rows", "blocks", "block"), [(7, 3, 16), (16, 1, 32), (33, 5, 128)])
def test_quantized_round_trip(bits, zeros, rows, blocks, block) -> None:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scales = random.standard_normal((rows, blocks)).astype(np.float32)
    points = None
    if zeros:
        # What lies past the last block in the last byte is zero, as quantisers write it.
        points = cpu_layout._pack(random.integers(0, 2**bits, (rows, blocks)).astype(np.uint8), bits)
    packed = cpu_layout.pack_quantized(codes, scales, points, bits)
    assert packed.codes.shape == (-(-rows // 16), blocks * block * bits // 32, 16)
    back = cpu_layout.unpack_quantized(packed, bits, rows)
    for one, other in zip(back, (codes, scales, points), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one is None or one.dtype == other.dtype


def test_quantized_layout_is_as_documented() -> None:
    """Byte i of a word holds columns i and i + 4, the low half first."""
    codes = np.array([[[0x10, 0x32, 0x54, 0x76]]], np.uint8)  # columns 0..7 hold their own number
    packed = cpu_layout.pack_quantized(codes, np.ones((1, 1), np.float32), None, 4)
    assert packed.codes[0, 0, 0] == 0x73625140
    assert (packed.codes[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("shape", [(5, 7), (16, 3), (40, 20)])
def test_linear_round_trip(shape) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
    np.testing.assert_array_equal(cpu_layout.unpack_linear(cpu_layout.pack_linear(weight), len(weight)), weight)


@pytest.mark.parametrize("name", CONVS)
def test_conv_round_trip(name) -> None:
    conv = CONVS[name]
    weight = tensors(conv)[1]
    pair = (cpu_layout.pack_conv, cpu_layout.unpack_conv)
    if conv.transposed:
        pair = (cpu_layout.pack_conv_transpose, cpu_layout.unpack_conv_transpose)
    pack, unpack = pair
    np.testing.assert_array_equal(unpack(pack(weight, conv.groups), conv.channels[1], conv.kernel), weight)


SANITIZED = "avx2"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Kernels as a program that ends at the first stray access or undefined operation; arrays have no room to spare."""
    if not is_native(SANITIZED) or not runs_here(SANITIZED):
        pytest.skip("no native variant to build")
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return Program(build(SANITIZED, tmp_path_factory.mktemp("sanitized"), program=True, extra=flags))


def test_sanitizers_end_a_stray_access(sanitized) -> None:
    x = np.ones((1, 64), np.float32)
    with pytest.raises(RuntimeError, match="AddressSanitizer"):
        calls.rms_norm(sanitized, x, np.ones(63, np.float32), 1e-5)


def test_sanitized(sanitized) -> None:
    random = np.random.default_rng(9)
    for matrix, m, fast in itertools.product(MATRICES, (1, 5), (False, True)):
        fixed = weights(random, *matrix)
        x = random.standard_normal((m, matrix[4])).astype(np.float32)
        result = calls.quantized_linear(sanitized, x, **fixed, fast=fast, tasks=2)
        assert_near(result, op_cases.quantized_linear(x, **fixed)[0], 3e-2 if fast else 3e-6)
    for name in CONVS:
        x, weight = tensors(CONVS[name])
        assert_near(call(sanitized, x, weight, CONVS[name], tasks=2), sums(name))
    for name in ("silu", "snake", "tanh"):
        calls.activate(sanitized, random.standard_normal(37).astype(np.float32), name)
    for width in (12, 32):
        rows = {"query": random.standard_normal((1, 21, 8 * width)).astype(np.float32)}
        sizes = {"heads": 4, "kv_heads": 2, "scale": 0.2, "window": 6, "softcap": 5.0}
        expected = op_cases.kv_attention(rows["query"], None, None, None, None, **sizes)
        check_attention(sanitized, rows, None, None, sizes, 21, ((21,), (20, 1)), expected)
