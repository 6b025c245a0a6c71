"""Convolutions against sums in float64, tap by tap."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from tests.kernels import calls
from tests.kernels.test_activations import FORMULAS
from tests.kernels.test_fused_ops import assert_near


@dataclass(frozen=True)
class Conv:
    """One convolution; pairs are (vertical, horizontal), padding is (top, left, bottom, right)."""

    channels: tuple[int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: int = 1
    transposed: bool = False
    output_padding: int = 0
    batch: int = 1

    def out(self) -> tuple[int, int, int]:
        sizes = []
        for axis in range(2):
            span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            pads = self.pad[axis] + self.pad[axis + 2]
            height = self.size[axis] * (self.upsample if self.size[0] > 1 or axis else 1)
            if self.transposed:
                extra = self.output_padding if self.stride[axis] > 1 else 0
                sizes.append((height - 1) * self.stride[axis] + span - pads + extra)
            else:
                sizes.append((height + pads - span) // self.stride[axis] + 1)
        return (self.channels[1], sizes[0], sizes[1])


def convolved(x, weight, conv: Conv):
    """Every tap adds its share to where it goes, in float64."""
    for axis in (2, 3):
        if x.shape[axis] > 1:
            x = x.repeat(conv.upsample, axis)
    out, (sy, sx), (dy, dx) = conv.out(), conv.stride, conv.dilation
    into, of = conv.channels[1] // conv.groups, conv.channels[0] // conv.groups
    y = np.zeros((len(x), *out))
    for group, ky, kx in itertools.product(range(conv.groups), range(conv.kernel[0]), range(conv.kernel[1])):
        ins, outs = (slice(group * n, (group + 1) * n) for n in (of, into))
        if conv.transposed:
            tap = np.einsum("bihw,io->bohw", x[:, ins], weight[ins, :, ky, kx])
            for i, j in itertools.product(range(x.shape[2]), range(x.shape[3])):
                row, column = i * sy + ky * dy - conv.pad[0], j * sx + kx * dx - conv.pad[1]
                if 0 <= row < out[1] and 0 <= column < out[2]:
                    y[:, outs, row, column] += tap[:, :, i, j]
        else:
            far = [(0, 0), (0, 0), (conv.pad[0], conv.pad[2] + sy), (conv.pad[1], conv.pad[3] + sx)]
            padded = np.pad(x[:, ins], far)[:, :, ky * dy :, kx * dx :]
            part = padded[:, :, : (out[1] - 1) * sy + 1 : sy, : (out[2] - 1) * sx + 1 : sx]
            y[:, outs] += np.einsum("bihw,oi->bohw", part, weight[outs, :, ky, kx])
    return y


def audio(into: int, out: int, length: int, kernel: int, pad: int, **more) -> Conv:
    pairs = {name: (1, more.pop(name)) for name in ("stride", "dilation") if name in more}
    return Conv((into, out), (1, length), (1, kernel), (0, pad, 0, pad), **pairs, **more)


CONVS = {
    "image-3x3": Conv((16, 24), (8, 8), (3, 3), (1, 1, 1, 1), batch=2),
    "image-odd": Conv((5, 7), (9, 11), (3, 5), (1, 2, 1, 2)),
    "image-one-channel": Conv((3, 1), (13, 13), (3, 3), (1, 1, 1, 1)),
    "image-pointwise": Conv((6, 10), (5, 9), (1, 1)),
    "image-stride2-asymmetric": Conv((4, 9), (16, 16), (3, 3), (0, 0, 1, 1), stride=(2, 2)),
    "image-stride-dilation": Conv((3, 4), (15, 17), (3, 2), (2, 1, 2, 1), stride=(2, 3), dilation=(2, 2)),
    "image-upsample": Conv((4, 8), (7, 9), (3, 3), (1, 1, 1, 1), upsample=2),
    "image-groups": Conv((6, 12), (6, 7), (3, 3), (1, 1, 1, 1), groups=3),
    "image-depthwise": Conv((9, 9), (6, 20), (3, 3), (1, 1, 1, 1), groups=9),
    "image-large": Conv((64, 8), (40, 36), (3, 3), (1, 1, 1, 1)),
    "audio-7": audio(16, 16, 333, 7, 3),
    "audio-dilated": audio(8, 8, 100, 7, 27, dilation=9),
    "audio-short": audio(8, 16, 2, 7, 3),
    "audio-tiles": audio(8, 3, 6500, 7, 3),
    "audio-pointwise": audio(32, 32, 49, 1, 0),
    "audio-stride4": audio(8, 16, 256, 8, 2, stride=4),
    "audio-upsample": audio(4, 4, 50, 3, 1, upsample=2),
    "audio-transposed4": audio(16, 8, 100, 8, 2, stride=4, transposed=True),
    "audio-transposed5-odd": audio(6, 5, 31, 11, 3, stride=5, transposed=True, output_padding=1),
    "audio-transposed-dilated": audio(3, 4, 20, 3, 1, stride=2, dilation=3, transposed=True),
    "audio-transposed-gaps": audio(3, 4, 20, 2, 0, stride=3, transposed=True),
    "image-transposed2": Conv((5, 9), (6, 7), (4, 4), (1, 1, 1, 1), stride=(2, 2), transposed=True, batch=2),
    "image-transposed-groups": Conv((6, 4), (5, 5), (3, 3), (1, 1, 1, 1), stride=(2, 1), groups=2, transposed=True),
}


def tensors(conv: Conv, seed: int = 1):
    random = np.random.default_rng(seed)
    shape = (conv.channels[0], conv.channels[1] // conv.groups)
    shape = shape if conv.transposed else (conv.channels[1], conv.channels[0] // conv.groups)
    x = random.standard_normal((conv.batch, conv.channels[0], *conv.size)).astype(np.float32)
    size = (conv.channels[0] // conv.groups * conv.kernel[0] * conv.kernel[1]) ** -0.5
    return x, (size * random.standard_normal((*shape, *conv.kernel))).astype(np.float32)


def call(run, x, weight, conv: Conv, **more):
    sizes = {name: getattr(conv, name) for name in ("stride", "dilation", "groups", "upsample", "transposed")}
    return calls.conv(run, x, weight, out=conv.out(), pad=conv.pad[:2], **sizes, **more)


@cache
def sums(name: str):
    x, weight = tensors(CONVS[name])
    return convolved(x.astype(float), weight.astype(float), CONVS[name])


@pytest.mark.parametrize("name", CONVS)
def test_conv(run, name: str) -> None:
    x, weight = tensors(CONVS[name])
    for tasks in (1, 3):
        assert_near(call(run, x, weight, CONVS[name], tasks=tasks), sums(name))


@pytest.mark.parametrize(
    "name", ["image-3x3", "image-stride2-asymmetric", "image-upsample", "audio-7", "audio-transposed4"]
)
@pytest.mark.parametrize(
    ("before", "after"), [("silu", "none"), ("snake", "snake"), ("none", "tanh"), ("none", "silu")]
)
def test_fused(run, name: str, before: str, after: str) -> None:
    """Padding is of the changed input: a shift must not reach it."""
    conv = CONVS[name]
    x, weight = tensors(conv)
    random = np.random.default_rng(2)
    per_batch = before == "silu"
    scale, shift = (
        random.standard_normal((conv.batch, conv.channels[0]) if per_batch else conv.channels[0]).astype(np.float32)
        for _ in range(2)
    )
    bias = random.standard_normal(conv.channels[1]).astype(np.float32)
    residual = random.standard_normal((conv.batch, *conv.out())).astype(np.float32)
    axes = (slice(None), slice(None)) if per_batch else (None, slice(None))
    changed = FORMULAS[before](x.astype(float) * scale[axes][..., None, None] + shift[axes][..., None, None])
    total = convolved(changed, weight.astype(float), conv) + bias[:, None, None] + residual
    more = {"scale": scale, "shift": shift, "before": before, "bias": bias, "residual": residual, "after": after}
    assert_near(call(run, x, weight, conv, **more), FORMULAS[after](total))
