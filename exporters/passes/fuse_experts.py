"""Puts ONNX Runtime's operator for mixtures of experts in the place of experts that are executed densely.

Given:  share = ReduceSum(Equal(choice, [0 .. E-1]) * weights, 1)           [T, E, 1], and no weight is negative
        h = swiglu(MatMulNBits(x, gate and up of every expert)) * share     [T, E, I]
        y = MatMulNBits(h[:, 0], down 0) + ... + MatMulNBits(h[:, E-1], down E-1)
Result: y = QMoE(x, share, gates and ups [E, 2I, K/2], downs [E, H, I/2], share)

The operator chooses for itself: the k largest of its second input, each weighted by the entry of the last one. A share
is zero where the router did not choose, so those k are the router's own and their weights are its own; a zero that
makes up the number is not computed. A negative weight would be left out, so the graph has to show that there is none.
The kernel reads the codes of MatMulNBits with float32 activations (4 bits) or int8 ones (4 and 8 bits), and multiplies
each row with the experts that it chose: k / E of the weights in a step.

Experts that the kernel has no such product for stay as they are: other widths of a code, blocks that do not divide the
matrix (it would dequantise them whole in every run), tables of values, an act-order of the second matrix, other gates.
So do experts of floats: MoE, their operator, wants them turned otherwise than products do, and a bundle of this form
and the standard one would hold them twice.
Source: onnxruntime/contrib_ops/cpu/moe/moe_quantization_cpu.cc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.external_data import SOURCE
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.editor import Editor
from exporters.passes.initializers import lazy_initializer
from exporters.passes.set_accuracy_level import INT8_ACTIVATIONS

#: Key of the operator's metadata: prefixes of the matrices in it, that of gates and ups first, one a line.
MATRICES = "edge.matrices"
#: What the names of the operator's weights end in.
SUFFIX = ".experts"
PRODUCT, EXPERTS = "MatMulNBits", "QMoE"
#: Operators whose values are those of their first input, moved; that are never negative; and that are not where none
#: of their inputs is.
_MOVES = frozenset({
    "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "ReduceSum", "Reshape", "Slice",
    "Squeeze", "TopK", "Transpose", "Unsqueeze",
})  # fmt: skip
_NEVER_NEGATIVE = frozenset({"Abs", "Equal", "Exp", "Relu", "Sigmoid", "Softmax"})
_OF_SUCH = frozenset({"Add", "Concat", "Div", "Mul"})
#: Elements of a constant that is looked into.
_SMALL = 1024


def fuse_experts(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place, for float32 activations."""
    _fuse(model, bits=(4,), level=None)


def fuse_experts_fast(model: ir.Model, context: Context) -> None:
    """The same for int8 activations."""
    _fuse(model, bits=(4, 8), level=INT8_ACTIVATIONS)


def unread(model: ir.Model) -> int:
    """Bytes of experts' weights that one row leaves unread: those of all experts but k, in every layer."""
    total = 0
    for node in model.graph:
        if node.op_type == EXPERTS:
            weights = [value for value in node.inputs if value is not None and value.is_initializer()]
            experts, chosen = weights[0].shape[0], node.attributes["k"].as_int()
            total += sum(value.const_value.nbytes for value in weights) * (experts - chosen) // experts
    return total


def _fuse(model: ir.Model, bits: Sequence[int], level: int | None) -> None:
    found = [experts for node in model.graph if node.op_type == "Mul" and (experts := _find(node)) is not None]
    for experts in found:
        if experts.inner.attributes["bits"].as_int() in bits and experts.storable():
            _replace(model, experts, level)
    if found:
        RemoveUnusedNodesPass()(model)
        drop_unused(model)


@dataclass(frozen=True)
class _Experts:
    """What was found of one layer.

    Attributes:
        share: [T, E, 1].
        chosen: k.
        inner: the product with gates and ups, whose rows alternate.
        outer: the product of each expert, by its number.
        total: the node that makes their sum.
    """

    share: ir.Value
    chosen: int
    inner: ir.Node
    outer: tuple[ir.Node, ...]
    total: ir.Node

    def storable(self) -> bool:
        """Whether the kernel takes the matrices as they are."""
        alike = {
            (*(node.attributes[key].as_int() for key in ("bits", "block_size", "K", "N")), _has_zeros(node))
            for node in self.outer
        }
        bits, block, columns = (self.inner.attributes[key].as_int() for key in ("bits", "block_size", "K"))
        if len(alike) != 1 or columns % block or any(_has_bias(node) for node in (self.inner, *self.outer)):
            return False
        [(outer_bits, outer_block, width, rows, zeros)] = alike
        return (
            (outer_bits, outer_block, rows, zeros) == (bits, block, columns, _has_zeros(self.inner))
            and width % block == 0
            and self.inner.attributes["N"].as_int() == 2 * width * len(self.outer)
            # Of rows of one block the kernel expects the zero points in another arrangement.
            and not (zeros and min(columns, width) == block)
        )


def _find(product: ir.Node) -> _Experts | None:
    """The experts whose gated features ``product`` multiplies with their shares."""
    for gated, share in (product.inputs, product.inputs[::-1]):
        chosen = _chosen(share)
        joined = _gated(gated)
        if chosen is None or joined is None or not _never_negative(share):
            continue
        experts = share.shape[1]
        inner, ends = _alternating(joined, experts), _sum(product.outputs[0], experts)
        if inner is not None and ends is not None:
            return _Experts(share, chosen, inner, *ends)
    return None


def _chosen(share: ir.Value) -> int | None:
    """k, if ``share`` [T, E, 1] is the sum of k rows that are not zero in one place each."""
    node = share.producer()
    if node is None or node.op_type not in ("Unsqueeze", "Reshape") or not _ends(share, 1):
        return None
    total = node.inputs[0].producer()
    if total is None or total.op_type != "ReduceSum" or not _is(total.inputs[1], [1]):
        return None
    weighted = total.inputs[0].producer()
    if weighted is None or weighted.op_type != "Mul":
        return None
    for value in weighted.inputs:
        cast = value.producer()
        equal = cast.inputs[0].producer() if cast is not None and cast.op_type == "Cast" else None
        if equal is None or equal.op_type != "Equal" or value.shape is None or len(value.shape) != 3:
            continue
        numbers = np.arange(share.shape[1])
        if any(_is(number, numbers) for number in equal.inputs) and isinstance(value.shape[1], int):
            return value.shape[1]
    return None


def _gated(value: ir.Value) -> ir.Value | None:
    """What ``value`` is the SwiGLU of (exporters/ops/swiglu.py)."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    silu, up = node.inputs[0].producer(), node.inputs[1]
    if silu is None or silu.op_type != "QuickGelu" or silu.attributes["alpha"].as_float() != 1:
        return None
    halves = up.producer()
    if halves is None or halves.op_type != "Split" or list(halves.outputs) != [silu.inputs[0], up]:
        return None
    return halves.inputs[0]


def _alternating(joined: ir.Value, experts: int) -> ir.Node | None:
    """The product whose features, [E, I, 2] in a row, ``joined`` [T, E, 2I] is: gate behind gate, then up behind up."""
    if not _ends(joined, experts, 2 * (width := joined.shape[-1] // 2)):
        return None
    node, turned = joined.producer(), []
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose":
            turned.append((list(node.attributes["perm"].as_ints()), _ends(node.inputs[0], experts, width, 2)))
        node = node.inputs[0].producer()
    if node is None or node.op_type != PRODUCT or turned != [([0, 1, 3, 2], True)]:
        return None
    return node


def _sum(features: ir.Value, experts: int) -> tuple[tuple[ir.Node, ...], ir.Node] | None:
    """The product of each expert with its row of ``features`` [T, E, I], and the node that adds the last of them."""
    outer: dict[int, ir.Node] = {}
    for use in features.uses():
        row = use.node
        if row.op_type != "Gather" or row.attributes["axis"].as_int() != 1 or row.inputs[1].const_value is None:
            return None
        [number] = row.inputs[1].const_value.numpy().reshape(-1).tolist()
        readers = [each.node for each in row.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != PRODUCT:
            return None
        outer[number] = readers[0]
    if sorted(outer) != list(range(experts)):
        return None
    total, left = outer[0], {node.outputs[0] for number, node in outer.items() if number}
    while left:
        readers = [each.node for each in total.outputs[0].uses()]
        others = [value for node in readers for value in node.inputs if value is not total.outputs[0]]
        if len(readers) != 1 or readers[0].op_type != "Add" or len(others) != 1 or others[0] not in left:
            return None
        left.remove(others[0])
        total = readers[0]
    return tuple(outer[number] for number in range(experts)), total


def _never_negative(value: ir.Value | None) -> bool:
    """Whether the operators that ``value`` comes from give nothing under zero, whatever the weights are."""
    if value is None:
        return False
    if value.const_value is not None:
        return value.const_value.size <= _SMALL and bool((value.const_value.numpy() >= 0).all())
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _NEVER_NEGATIVE:
        return True
    if node.op_type in _MOVES:
        return _never_negative(node.inputs[0])
    return node.op_type in _OF_SUCH and all(map(_never_negative, node.inputs))


def _replace(model: ir.Model, experts: _Experts, level: int | None) -> None:
    inner, outer = experts.inner, experts.outer
    count = len(outer)
    add = Editor(model, experts.total)
    x = inner.inputs[0]
    share = add.reshape(experts.share, [experts.share.shape[0], count], [-1, count])
    first = [_cut(model, value, count) for value in _weights(inner)]
    second = [_stacked(model, values) for values in zip(*map(_weights, outer), strict=True)]
    codes, scales, zeros = zip(first, second, strict=True)
    inputs = [x, share, codes[0], scales[0], None, codes[1], scales[1], None, None, None, None, *zeros, None, share]
    numbers = dict(
        k=experts.chosen,
        activation_type="swiglu",
        swiglu_fusion=1,  # rows of gate and up alternate
        activation_alpha=1.0,
        activation_beta=0.0,
        expert_weight_bits=inner.attributes["bits"].as_int(),
        block_size=inner.attributes["block_size"].as_int(),
        normalize_routing_weights=0,
    ) | ({} if level is None else dict(accuracy_level=level))
    model.graph.opset_imports["com.microsoft"] = 1
    total = add(EXPERTS, inputs, numbers, x.dtype, experts.total.outputs[0].shape, domain="com.microsoft")
    names = [node.inputs[1].name.removesuffix(".codes") for node in (inner, *outer)]
    total.producer().metadata_props[MATRICES] = "\n".join(names)
    add.replace(total)


def _weights(product: ir.Node) -> tuple[ir.Value | None, ...]:
    """Codes, scales and zero points."""
    return (*product.inputs, None)[1:4]


def _has_zeros(product: ir.Node) -> bool:
    return _weights(product)[2] is not None


def _has_bias(product: ir.Node) -> bool:
    return any(value is not None for value in product.inputs[4:])


def _cut(model: ir.Model, value: ir.Value | None, experts: int) -> ir.Value | None:
    """[E*N, ..] as [E, N, rest of the row]: the same bytes."""
    if value is None:
        return None
    tensor = value.const_value
    shape = (experts, tensor.shape[0] // experts, math.prod(tensor.shape[1:]))
    cut = lazy_initializer(model, value.name + SUFFIX, value.dtype, shape, lambda: tensor.numpy().reshape(shape))
    if SOURCE in tensor.meta:
        cut.const_value.meta[SOURCE] = tensor.meta[SOURCE]
    return cut


def _stacked(model: ir.Model, values: Sequence[ir.Value | None]) -> ir.Value | None:
    """E times [N, ..] as [E, N, rest of the row]."""
    first, tensors = values[0], [value.const_value for value in values if value is not None]
    if first is None:
        return None
    shape = (len(tensors), tensors[0].shape[0], math.prod(tensors[0].shape[1:]))
    return lazy_initializer(model, first.name + SUFFIX, first.dtype, shape, partial(_fill, shape, tensors))


def _fill(shape: tuple[int, ...], tensors: Sequence[ir.TensorProtocol]) -> np.ndarray:
    """One expert after the other, so that the whole stands in memory once."""
    filled = np.empty(shape, tensors[0].dtype.numpy())
    for part, tensor in zip(filled, tensors, strict=True):
        part[:] = tensor.numpy().reshape(part.shape)
    return filled


def _ends(value: ir.Value, *sizes: int) -> bool:
    """Whether the last axes of ``value`` have these sizes."""
    return value.shape is not None and list(value.shape)[-len(sizes) :] == list(sizes)


def _is(value: ir.Value | None, wanted: Sequence[int] | np.ndarray) -> bool:
    """Whether ``value`` is a constant of these numbers."""
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.size == len(wanted) and np.array_equal(tensor.numpy().reshape(-1), wanted)
