"""What a convolution takes along from the graph around it, so that one kernel does it all.

Given   y = conv(pad(upsample(silu(group_norm(x)))))            Result  one call, with the norm as factors of its input
Given   y = silu(conv(x) + residual)                            Result  one call, sum and activation on the way out

Only what stands exactly so is taken: a value that something else reads as well is computed for itself. Nothing is
edited; the answers are read off the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import fx

from exporters import ops

ATEN = torch.ops.aten


class Activation(IntEnum):
    """As edge::Activation in kernels/cpu/edge_kernels.h."""

    NONE = 0
    SILU = 1
    SNAKE = 2
    TANH = 3


ACTIVATIONS: Mapping[Any, Activation] = {
    ATEN.silu.default: Activation.SILU,
    ATEN.tanh.default: Activation.TANH,
    ops.snake.overload: Activation.SNAKE,
}
#: operator -> whether it is a transposed convolution
CONVOLUTIONS: Mapping[Any, bool] = {
    ATEN.conv1d.default: False,
    ATEN.conv2d.default: False,
    ATEN.conv_transpose1d.default: True,
    ATEN.conv_transpose2d.input: True,
}


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, defaults included."""
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return given | node.kwargs


def same(node: fx.Node) -> fx.Node | None:
    """The node that this one merely hands on, or None."""
    if node.op != "call_function":
        return None
    given = node.args
    if node.target is ATEN.clone.default:
        return given[0]
    if node.target is ATEN.div.Tensor and not isinstance(given[1], fx.Node) and given[1] == 1:
        return given[0]
    return None


def plain(node: fx.Node) -> fx.Node:
    """The node behind all that merely hand it on."""
    while (source := same(node)) is not None:
        node = source
    return node


def _alone(node: fx.Node) -> fx.Node | None:
    """``plain(node)`` where nothing else reads it, else None."""
    while len(node.users) == 1 and (source := same(node)) is not None:
        node = source
    return node if len(node.users) == 1 else None


@dataclass(frozen=True)
class Reading:
    """How a convolution reads its input: activation(x * scale + shift), upsampled, then padded.

    Attributes:
        source: the node that is x.
        norm: a group norm over x whose factors are scale and shift, or None.
        scale: a constant with one factor a channel, or None.
        upsample: 2 where each value is read twice along every axis, else 1.
        padding: zeros (in front, behind) of each axis, on top of the convolution's own.
    """

    source: fx.Node
    norm: fx.Node | None = None
    scale: fx.Node | None = None
    activation: Activation = Activation.NONE
    upsample: int = 1
    padding: tuple[tuple[int, int], ...] = ()


def reading_of(node: fx.Node, transposed: bool) -> Reading:
    """What stands in front of a convolution that reads ``node``."""
    node, rank = plain(node), node.meta["val"].dim() - 2
    reading = Reading(node, padding=((0, 0),) * rank)
    if not transposed:
        reading = _upsampled(_padded(reading))
    source = reading.source
    if source.target in ACTIVATIONS and ending_in(source) is None and source.target is not ATEN.tanh.default:
        reading = replace(reading, source=plain(source.args[0]), activation=ACTIVATIONS[source.target])
    return _scaled(reading)


def _padded(reading: Reading) -> Reading:
    node = reading.source
    if node.target not in (ATEN.pad.default, ATEN.constant_pad_nd.default):
        return reading
    given = arguments(node)
    amounts, value = given["pad"], given["value"]
    if given.get("mode", "constant") != "constant" or value or min(amounts) < 0:
        return reading
    if len(amounts) > 2 * len(reading.padding):
        return reading
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]  # the last axis comes first in the list
    pairs = [(0, 0)] * (len(reading.padding) - len(pairs)) + pairs
    return replace(reading, source=plain(node.args[0]), padding=tuple(pairs))


def _upsampled(reading: Reading) -> Reading:
    node = reading.source
    if node.target is not ATEN.upsample_nearest2d.vec or arguments(node)["scale_factors"] != [2.0, 2.0]:
        return reading
    return replace(reading, source=plain(node.args[0]), upsample=2)


def _scaled(reading: Reading) -> Reading:
    node = reading.source
    if node.target is ATEN.group_norm.default and all(arguments(node)[name] for name in ("weight", "bias")):
        return replace(reading, source=plain(node.args[0]), norm=node)
    if node.target is ATEN.mul.Tensor:
        for factor, other in (node.args, node.args[::-1]):
            if _is_channel_factor(factor, other):
                return replace(reading, source=plain(other), scale=factor)
    return reading


def _is_channel_factor(factor: Any, other: Any) -> bool:
    """Whether ``factor`` is a constant [1, C, 1...] for an ``other`` of C channels."""
    if not isinstance(factor, fx.Node) or not isinstance(other, fx.Node) or factor.op != "placeholder":
        return False
    shape, like = factor.meta["val"].shape, other.meta["val"].shape
    wanted = (1, like[1], *[1] * (len(like) - 2))
    return tuple(shape) == wanted and all(isinstance(size, int) for size in shape)


@dataclass(frozen=True)
class ConvPlan:
    """A convolution with what it takes along.

    Attributes:
        conv: its node.
        reading: how it reads its input.
        residual: the node that is added to the sum, or None.
        activation: what happens to the sum.
    """

    conv: fx.Node
    reading: Reading
    residual: fx.Node | None = None
    activation: Activation = Activation.NONE

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return CONVOLUTIONS[self.conv.target]

    def _axes(self) -> Iterable[tuple[int, int, int, int, int, int, int]]:
        """Per axis: kernel, stride, zeros in front, zeros behind, dilation, output padding, upsampling."""
        given = arguments(self.conv)
        kernel = given["weight"].meta["val"].shape[2:]
        rank = len(kernel)
        stride, padding, dilation = (_each(given[name], rank) for name in ("stride", "padding", "dilation"))
        extra = _each(given.get("output_padding", 0), rank)
        for axis in range(rank):
            front, behind = self.reading.padding[axis]
            own = padding[axis]
            yield (
                kernel[axis], stride[axis], own + front, own + behind, dilation[axis], extra[axis],
                self.reading.upsample,
            )  # fmt: skip

    def numbers(self) -> tuple[int, ...]:
        """Kernel, stride, padding in front and dilation (height, width each), groups, upsampling."""
        axes = list(self._axes())
        if len(axes) == 1:
            axes.insert(0, (1, 1, 0, 0, 1, 0, 1))
        columns = [[axis[i] for axis in axes] for i in (0, 1, 2, 4)]
        return (*(number for pair in columns for number in pair), arguments(self.conv)["groups"], self.reading.upsample)

    def output_shape(self, source: Sequence[Any], channels: int) -> tuple[Any, ...]:
        """The result's shape from that of the input, whose sizes may be symbolic."""
        sizes = []
        for size, (kernel, stride, front, behind, dilation, extra, times) in zip(source[2:], self._axes(), strict=True):
            reach = dilation * (kernel - 1) + 1
            if self.transposed:
                sizes.append((size - 1) * stride - front - behind + reach + extra)
            else:
                whole = size * times + front + behind - reach
                sizes.append((whole if stride == 1 else whole // stride) + 1)
        return (source[0], channels, *sizes)


def _each(value: Any, rank: int) -> list[int]:
    """A list with one number an axis."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


def ending_in(node: fx.Node) -> ConvPlan | None:
    """The convolution whose call yields the value of ``node``, with all it takes along; None where there is none."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        given = arguments(node)
        if given["weight"].op != "placeholder" or isinstance(given["padding"], str):
            return None
        return ConvPlan(node, reading_of(given["input"], CONVOLUTIONS[node.target]))
    if node.target in ACTIVATIONS:
        plan = _behind(node.args[0])
        return replace(plan, activation=ACTIVATIONS[node.target]) if plan and not plan.activation else None
    if node.target is ATEN.add.Tensor and arguments(node)["alpha"] == 1:
        for value, other in (node.args, node.args[::-1]):
            if isinstance(value, fx.Node) and isinstance(other, fx.Node) and value is not other:
                plan = _behind(value)
                alike = value.meta["val"].shape == other.meta["val"].shape
                if plan and alike and plan.residual is None and not plan.activation:
                    return replace(plan, residual=other)
    return None


def _behind(node: fx.Node) -> ConvPlan | None:
    source = _alone(node)
    return None if source is None else ending_in(source)
