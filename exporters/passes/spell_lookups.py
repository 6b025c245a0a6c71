"""Spells out a lookup in a table of codes: only the rows asked for are unpacked, with integer operators.

Given:  Lookup(ids, codes uint8 [V, nb, w], scales [V, nb], zeros or none) {bits, columns, encoding or none}
Result: Gather(words int32 [V, n], ids), its fields by Div and Mod, minus the zero points, times Gather(scales, ids);
        where the codes stand for the values of a table, those by one more Gather, and no zero points

A word is four bytes of the codes read as little-endian int32. Integer division of a negative word differs between
runtimes, so its top bit is taken off first and added to the last field.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.ops import BUILD
from exporters.passes.context import Context
from exporters.passes.editor import Editor
from exporters.passes.initializers import value_table
from exporters.passes.words import word_initializer

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def spell_lookups(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place."""
    for node in list(model.graph):
        if node.domain == BUILD and node.op_type == "Lookup":
            _spell(model, node)


def _spell(model: ir.Model, node: ir.Node) -> None:
    ids, codes, scales, zeros = (*node.inputs, None)[:4]
    bits, columns = node.attributes["bits"].as_int(), node.attributes["columns"].as_int()
    blocks, width = codes.const_value.shape[1:]
    block = 8 * width // bits
    add, lead = Editor(model, node), list(ids.shape)

    def fields(table: ir.Value, count: int) -> ir.Value:
        """The first ``count`` fields of the rows asked for, float32 [..., count]."""
        words = add("Gather", [table, ids], {}, INT32, [*lead, table.shape[1]])
        return _fields(add, words, bits, count)

    values = add.reshape(
        fields(word_initializer(model, codes), blocks * block),
        [*lead, blocks, block],
        [0] * len(lead) + [blocks, block],
    )
    if "encoding" in node.attributes:
        table = value_table(model, node.attributes["encoding"].as_string())
        values = add("Gather", [table, add.cast(values, INT32)], {}, FLOAT, values.shape)
        points = None
    elif zeros is None:
        points = add.constant(np.array(2.0 ** (bits - 1), np.float32))
    else:
        points = _column(add, fields(word_initializer(model, zeros), blocks))
    centred = values if points is None else add("Sub", [values, points], {}, FLOAT, values.shape)
    rows = add("Gather", [scales, ids], {}, scales.dtype, [*lead, blocks])
    scaled = add("Mul", [centred, _column(add, add.cast(rows, FLOAT))], {}, FLOAT, values.shape)
    flat = add.reshape(scaled, [*lead, blocks * block], [0] * len(lead) + [blocks * block])
    add.replace(_first(add, flat, columns))


def _fields(add: Editor, words: ir.Value, bits: int, count: int) -> ir.Value:
    """float32 [..., count] of int32 words [..., n], low bits first."""
    lead, number = list(words.shape[:-1]), words.shape[-1]
    per_word = 32 // bits
    column = add("Unsqueeze", [words, add.constant(np.array([-1], np.int64))], {}, INT32, [*lead, number, 1])
    negative = add("Less", [column, add.constant(np.array(0, np.int32))], {}, ir.DataType.BOOL, column.shape)
    lowest = add.constant(np.array(-(2**31), np.int32))
    positive = add(
        "Where", [negative, add("Sub", [column, lowest], {}, INT32, column.shape), column], {}, INT32, column.shape
    )
    shifts = add.constant(2 ** (bits * np.arange(per_word, dtype=np.int32)))
    shape = [*lead, number, per_word]
    parts = add(
        "Mod",
        [add("Div", [positive, shifts], {}, INT32, shape), add.constant(np.array(2**bits, np.int32))],
        {},
        INT32,
        shape,
    )
    top = np.zeros(per_word, np.int32)
    top[-1] = 2 ** (bits - 1)
    nothing = add.constant(np.zeros(per_word, np.int32))
    sign = add("Where", [negative, add.constant(top), nothing], {}, INT32, shape)
    whole = add("Add", [parts, sign], {}, INT32, shape)
    flat = add.reshape(whole, [*lead, number * per_word], [0] * len(lead) + [number * per_word])
    return add.cast(_first(add, flat, count), FLOAT)


def _first(add: Editor, value: ir.Value, count: int) -> ir.Value:
    """The first ``count`` of the last axis."""
    if value.shape[-1] == count:
        return value
    start, end, axis = (add.constant(np.array([number], np.int64)) for number in (0, count, -1))
    return add("Slice", [value, start, end, axis], {}, value.dtype, [*value.shape[:-1], count])


def _column(add: Editor, value: ir.Value) -> ir.Value:
    return add("Unsqueeze", [value, add.constant(np.array([-1], np.int64))], {}, value.dtype, [*value.shape, 1])
