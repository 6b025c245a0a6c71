"""What a compiler made of our graph: which patterns became one layer, which did not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from exporters.tensorrt_rtx import Layer

#: What we hope to see in one layer: name -> (operator, operators of which one should be in its layer, how many nodes
#: before it that one may be). Without any: a kernel of its own, known by the letters in its name.
PATTERNS: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "quantised product": ("MatMul", ("DequantizeLinear",), 2),
    "int8 convolution": ("Conv", ("DequantizeLinear",), 1),
    "norm and SiLU": ("Sigmoid", ("GroupNormalization", "InstanceNormalization"), 4),
    "Snake": ("Sin", ("Mul", "Add"), 2),
    "attention": ("TRT_Attention", (), 0),
    "attention spelled out": ("Softmax", (), 0),
}
MHA = "mha"
#: Nodes that are named where a pattern was not fused.
NAMED = 3


def patterns(model: ir.Model, layers: Iterable[Layer]) -> dict[str, dict[str, Any]]:
    """Pattern that the graph has -> {"fused": how many, "of": how many, "apart": names of the first that are not}."""
    layers_of: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        for name in layer.nodes:
            layers_of[name].append(layer)
    kinds = {node.name: node.op_type for node in model.graph}
    verdicts = {}
    for pattern, (center, partners, depth) in PATTERNS.items():
        nodes = [node for node in model.graph if node.op_type == center and _follows(node, partners, depth)]
        apart = [node.name or "" for node in nodes if not _fused(layers_of[node.name or ""], kinds, partners)]
        if nodes:
            verdicts[pattern] = {"fused": len(nodes) - len(apart), "of": len(nodes), "apart": apart[:NAMED]}
    return verdicts


def _follows(node: ir.Node, partners: Sequence[str], depth: int) -> bool:
    """Whether one of the partners is among the ``depth`` nearest generations in front of the node."""
    generation, found = [node], not partners
    for _ in range(depth):
        inputs = [value for each in generation for value in each.inputs if value is not None]
        generation = [maker for value in inputs if (maker := value.producer()) is not None]
        found = found or any(maker.op_type in partners for maker in generation)
    return found


def _fused(layers: Sequence[Layer], kinds: Mapping[str | None, str], partners: Sequence[str]) -> bool:
    if not partners:
        return any(MHA in layer.name for layer in layers)
    return any(kinds.get(name) in partners for layer in layers for name in layer.nodes)
