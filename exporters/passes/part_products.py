"""Writes a quantised product whose result is cut into equal parts as one product for each, for int8 activations.

Given:  Split(MatMulNBits(x, W [N, K], ..)) {num_outputs: n}
Result: MatMulNBits(x, rows i*N/n .. (i+1)*N/n of W, ..) for i < n

Those are the gate and up projections of an MLP. Rounding x twice takes less than a copy of the result: at 896 x 4864 a
decode step's MLPs are 1.02 times as fast, a prompt's 1.01, and at 1536 x 8960 1.04 and 1.01 (1.31, two cores). With
float32 activations a step is slower by as much, so that form keeps them joined. Where both forms are written, the parts
are read from the joined matrix's place.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.external_data import PIECE, SOURCE
from exporters.passes.context import Context
from exporters.passes.initializers import shared_initializer

#: What the name of a part's tensors ends in.
PART = re.compile(r"\.part(\d+)$")


def part_products(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; a product that anything else reads stays whole."""
    for split in list(model.graph):
        if split.op_type != "Split" or len(split.inputs) > 1:  # parts of other sizes are the second input
            continue
        product, count = split.inputs[0].producer(), len(split.outputs)
        if product is None or product.op_type != "MatMulNBits" or len(split.inputs[0].uses()) > 1:
            continue
        if split.attributes["axis"].as_int() != -1 or product.attributes["N"].as_int() % count:
            continue
        for index, output in enumerate(split.outputs):
            _multiply(model, split, product, output, index, count)
        model.graph.remove([split, product], safe=True)


def part_of(weight: ir.Value) -> int | None:
    """Which of a matrix's parts a tensor belongs to, None for one of a whole matrix."""
    found = PART.search(weight.name)
    return None if found is None else int(found[1])


def _multiply(model: ir.Model, split: ir.Node, product: ir.Node, output: ir.Value, index: int, count: int) -> None:
    x, *weights = product.inputs
    attributes = {name: attribute.value for name, attribute in product.attributes.items()}
    attributes["N"] //= count
    # No part is what the Program's node makes, so they count as the node that cuts it.
    made = ir.node(
        "MatMulNBits",
        [x, *(None if value is None else _part(model, value, index, count) for value in weights)],
        attributes,
        domain=product.domain,
        metadata_props=product.metadata_props | split.metadata_props,
    )
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    model.graph.insert_before(split, made)
    output.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    made.outputs[0].name, output.name = output.name, None


def _part(model: ir.Model, value: ir.Value, index: int, count: int) -> ir.Value:
    """Rows of an initializer, which is loaded when it is written."""
    name, tensor = f"{value.name}.part{index}", value.const_value
    rows = tensor.shape[0] // count
    load = partial(_rows, tensor, slice(index * rows, (index + 1) * rows), name)
    part = ir.LazyTensor(load, dtype=tensor.dtype, shape=ir.Shape([rows, *tensor.shape[1:]]), name=name)
    if SOURCE in tensor.meta:
        part.meta[PIECE] = tensor.meta[SOURCE], index
    return shared_initializer(model, part)


def _rows(tensor: ir.TensorProtocol, rows: slice, name: str) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(tensor.numpy()[rows]), name=name)
