"""Moving a scale of a linear layer's input channels into what comes before it: exact, but for float32's rounding.

The input x of a stage is divided by s and its weights are multiplied by s, channel by channel. The division goes into
the weight of the norm that makes x, or into the rows of the linear layer whose outputs reach x channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from exporters.families.folding import assert_equal
from exporters.quantise.layer import Layer, Stage
from exporters.quantise.store import Fold

#: last part of a linear layer's name -> that of the layer whose rows scale its input: down(act(gate x) * up x), and
#: o(attention of v x), where attention mixes positions but no channels.
BEFORE: Mapping[str, str] = {"down_proj": "up_proj", "o_proj": "v_proj"}
#: What a fold may change of a layer's output, as a share of its largest value: some roundings of float32.
TOLERANCE = 1e-4


def channels(layer: Layer, stage: Stage) -> int:
    """How many scales the stage can take: its input's width, fewer where several of its channels come from one row
    (grouped-query attention), 0 where nothing before it can be scaled."""
    if stage.norm is not None:
        return layer.weight(stage.linears[0]).shape[1]
    before = _before(layer, stage)
    return 0 if before is None else layer.weight(before).shape[0]


def fold(layer: Layer, stage: Stage, scales: Tensor) -> None:
    """Divides a stage's input by ``scales`` [channels] and multiplies its weights by them.

    Raises:
        FoldMismatch: the layer then computes something else.
    """
    expected = layer.output()
    if stage.norm is not None:
        module = layer.module(stage.norm)
        layer.fold(f"{stage.norm}.weight", Fold(rows=scales, offset=_offset(module)))
    else:
        before = _before(layer, stage)
        assert before is not None  # channels() was not 0
        layer.fold(f"{before}.weight", Fold(rows=scales))
        if layer.module(before).bias is not None:
            layer.fold(f"{before}.bias", Fold(rows=scales))
    for name in stage.linears:
        layer.fold(f"{name}.weight", Fold(columns=spread(layer, stage, scales)))
    assert_equal(f"{layer.name}: {', '.join(stage.linears)}", layer.output(), expected, TOLERANCE)


def spread(layer: Layer, stage: Stage, scales: Tensor) -> Tensor:
    """The scale of every input channel [K]: those of a value head are repeated for the query heads that share it."""
    width = layer.weight(stage.linears[0]).shape[1]
    if len(scales) == width:
        return scales
    head = layer.head_width
    return scales.reshape(-1, 1, head).expand(-1, width // len(scales), head).reshape(-1)


def gather(layer: Layer, stage: Stage, values: Tensor, count: int) -> Tensor:
    """The largest of the input channels' ``values`` [K] that share a scale, [count]."""
    if len(values) == count:
        return values
    return values.reshape(-1, len(values) // count, layer.head_width).amax(1).reshape(-1)


def _before(layer: Layer, stage: Stage) -> str | None:
    if len(stage.linears) != 1:
        return None
    owner, _, last = stage.linears[0].rpartition(".")
    name = f"{owner}.{BEFORE.get(last, '')}"
    if last not in BEFORE or not layer.has(name):
        return None
    rows, width = layer.weight(name).shape[0], layer.weight(stage.linears[0]).shape[1]
    shared = last == "o_proj" and width % rows == 0 and rows % layer.head_width == 0
    return name if shared or width == rows else None


def _offset(norm: nn.Module) -> float:
    """0 where the norm multiplies by its weight, 1 where by 1 + weight: found by asking the module itself."""
    x = torch.linspace(-1, 2, norm.weight.shape[0])[None]
    zero, one = (torch.func.functional_call(norm, {"weight": torch.full_like(x[0], w)}, (x,)) for w in (0.0, 1.0))
    return 0.0 if not zero.any() else 1.0 if torch.allclose(one, 2 * zero) else float("nan")
