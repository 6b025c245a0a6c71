"""Joins what stands between a decoder's convolutions.

Given:  silu(group_norm(x));      snake(conv(x, W, bias))
Result: group_norm_silu(x);       bias_snake(conv(x, W), bias)
"""

from __future__ import annotations

from torch.fx import Graph

from exporters import ops
from exporters.passes.graph import ATEN, calls, insert, is_call, replace

_CONVOLUTIONS = (ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv_transpose1d.default)
_BIAS = 2


def fuse_epilogues(graph: Graph) -> None:
    """Edits ``graph`` in place."""
    for silu in calls(graph, ATEN.silu.default):
        norm = silu.args[0]
        if (
            is_call(norm, ATEN.group_norm.default)
            and len(norm.users) == 1
            and len(norm.args) >= 5
            and None not in norm.args[2:4]
        ):
            x, groups, weight, bias, eps = norm.args[:5]
            args = (x, weight, bias, groups, eps)
            replace(silu, insert(silu, ops.group_norm_silu.overload, args, silu.meta["val"]))
    for snake in calls(graph, ops.snake.overload):
        conv = snake.args[0]
        if (
            is_call(conv, *_CONVOLUTIONS)
            and len(conv.users) == 1
            and len(conv.args) > _BIAS
            and conv.args[_BIAS] is not None
        ):
            bias = conv.args[_BIAS]
            conv.args = (*conv.args[:_BIAS], None, *conv.args[_BIAS + 1 :])
            replace(snake, insert(snake, ops.bias_snake.overload, (conv, bias), snake.meta["val"]))
