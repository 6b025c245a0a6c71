"""What a compiler made of our graph: which patterns became one layer, which did not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from exporters.tensorrt_rtx import Layer

#: What we hope to see in one layer: name -> (operator, operators of which one should be in its layer). None: a kernel
#: of its own, known by the letters in its name.
PATTERNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quantised product": ("MatMul", ("DequantizeLinear",)),
    "int8 convolution": ("Conv", ("QuantizeLinear", "DequantizeLinear")),
    "norm and SiLU": ("GroupNormalization", ("Sigmoid",)),
    "Snake": ("Sin", ("Mul", "Add")),
    "attention": ("TRT_Attention", ()),
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
    for pattern, (center, partners) in PATTERNS.items():
        nodes = [node for node in model.graph if node.op_type == center and _has_partner(node, partners)]
        apart = [node.name or "" for node in nodes if not _fused(layers_of[node.name or ""], kinds, partners)]
        if nodes:
            verdicts[pattern] = {"fused": len(nodes) - len(apart), "of": len(nodes), "apart": apart[:NAMED]}
    return verdicts


def _has_partner(node: ir.Node, partners: Sequence[str]) -> bool:
    """Whether one of the partners is next to the node, or one further in front of it (a cast may lie between)."""
    if not partners:
        return True
    before = [value.producer() for value in node.inputs if value is not None]
    before += [value.producer() for each in before if each for value in each.inputs if value is not None]
    behind = [user for output in node.outputs for user, _ in output.uses()]
    return any(each is not None and each.op_type in partners for each in (*before, *behind))


def _fused(layers: Sequence[Layer], kinds: Mapping[str | None, str], partners: Sequence[str]) -> bool:
    if not partners:
        return any(MHA in layer.name for layer in layers)
    return any(kinds.get(name) in partners for layer in layers for name in layer.nodes)
