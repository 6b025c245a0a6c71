"""Gives the nodes of our kernels their packed weights as int32 words, and what the student leaves out: plugins take no
optional inputs.

Given:  EdgeNormLinear(x, norm, codes uint8 [N, nb, w], scales, zeros or none, bias or none)
Result: EdgeNormLinear(x, norm, words int32 [N, n], scales, words int32 [N, m], bias)
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.blocks import pack_bits
from exporters.ops.tensorrt import EDGE, WEIGHTS_AT
from exporters.passes.context import Context
from exporters.passes.initializers import lazy_initializer
from exporters.passes.words import SUFFIX, to_words, word_initializer


def pack_words(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in model.graph:
        if node.domain != EDGE or node.op_type not in WEIGHTS_AT:
            continue
        at = WEIGHTS_AT[node.op_type]
        has_bias = node.op_type != "EdgeHead"
        node.resize_inputs(max(len(node.inputs), at + 3 + has_bias))
        codes, _, zeros = node.inputs[at : at + 3]
        bits = node.attributes["bits"].as_int()
        node.replace_input_with(at, word_initializer(model, codes))
        points = _symmetric(model, codes, bits) if zeros is None else word_initializer(model, zeros)
        node.replace_input_with(at + 2, points)
        if has_bias and node.inputs[at + 3] is None:
            node.replace_input_with(at + 3, _no_bias(model, codes.const_value.shape[0], node.inputs[0].dtype))


def _no_bias(model: ir.Model, rows: int, dtype: ir.DataType) -> ir.Value:
    load = partial(np.zeros, rows, dtype.numpy())
    return lazy_initializer(model, f"no_bias_{rows}", dtype, (rows,), load)


def _symmetric(model: ir.Model, codes: ir.Value, bits: int) -> ir.Value:
    """Zero points 2^(bits-1) for every block, packed as the student's own would be."""
    rows, blocks = codes.const_value.shape[:2]
    name = f"{codes.name.removesuffix('.codes')}.zeros{SUFFIX}"
    load = partial(_middles, rows, blocks, bits)
    return lazy_initializer(model, name, ir.DataType.INT32, (rows, -(-blocks * bits // 32)), load)


def _middles(rows: int, blocks: int, bits: int) -> np.ndarray:
    return to_words(pack_bits(np.full((rows, blocks), 2 ** (bits - 1), np.uint8), bits))
