"""Spells out a product with codes of a table in the form that its runtime has for the encoding.

Given:  TableProduct(x, codes uint8 [N, nb, w], scales [N, nb]) {encoding, columns, form}
Result, with K' = nb*block, and x padded with zeros to K' where that is more than the columns:
    DequantizeLinear  W = DequantizeLinear(codes FLOAT8 [K', N], scales [nb, N]) {axis: 0}, or per column [K, N] where
                      a row has one scale; y = MatMul(x, W)
    Gather            W = Gather(table, Cast(codes uint8 [K', N])) * scales by block; y = MatMul(x, W)
    MatMulBnb4        y = MatMulBnb4(x, codes, scales): the very bytes of bitsandbytes, high nibble first
    MatMulNBits       y = MatMulNBits(x, 128 + 2 * table[codes], scales / 2) {bits: 8}

The last is exact: twice a value of fp4 is a whole number from -12 to 12, and half a float32 scale is a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from exporters.blocks import unpack_bits
from exporters.encodings import ENCODINGS, as_integers
from exporters.ops import BUILD
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.editor import Editor
from exporters.passes.initializers import lazy_initializer, shared_initializer, value_table

#: What is appended to a matrix's name for its codes and its scales.
CODES, SCALES = ".coded", ".coded_scales"
#: The same of a matrix that was rewritten for integers, whose parts are then called what theirs are.
DOUBLED = ".doubled"
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
TYPES = {"float8_e4m3fn": ir.DataType.FLOAT8E4M3FN, "float8_e5m2": ir.DataType.FLOAT8E5M2}
#: MatMulBnb4's number of the table.
NF4 = 1


def spell_tables(model: ir.Model, context: Context) -> None:
    """Edits ``model`` in place; what is written is loaded when it is."""
    for node in list(model.graph):
        if node.domain == BUILD and node.op_type == "TableProduct":
            Spelling(model, node).spell()
    if not any(node.domain == BUILD for node in model.graph):
        model.graph.opset_imports.pop(BUILD, None)
    drop_unused(model)  # the codes as they were packed


class Spelling:
    """One product while it is spelled out."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.add = model, Editor(model, node)
        self.x, codes, scales = node.inputs
        self.encoding, self.form = (node.attributes[key].as_string() for key in ("encoding", "form"))
        self.columns = node.attributes["columns"].as_int()
        self.codes, self.scales, self.scale_type = codes.const_value, scales.const_value, scales.dtype
        self.rows, self.blocks, width = self.codes.shape
        self.bits = ENCODINGS[self.encoding].bits
        self.block = 8 * width // self.bits
        self.padded = self.blocks * self.block
        self.prefix = codes.name.removesuffix(".codes")
        self.shape = node.outputs[0].shape

    def spell(self) -> None:
        """Puts the nodes in the place of the product."""
        form = self.form if self.form != "MatMulBnb4" or self.padded == self.columns else "Gather"
        make = {
            "DequantizeLinear": self._dequantised,
            "Gather": self._gathered,
            "MatMulBnb4": self._bitsandbytes,
            "MatMulNBits": self._integers,
        }
        self.add.replace(make[form]())

    def _initializer(self, suffix: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable) -> ir.Value:
        return lazy_initializer(self.model, self.prefix + suffix, dtype, shape, load)

    def _product(self, weight: ir.Value, length: int) -> ir.Value:
        x = self.x if length == self.columns else self.add.padded(self.x, length - self.columns)
        return self.add("MatMul", [x, self.add.cast(weight, x.dtype)], {}, x.dtype, self.shape)

    def _dequantised(self) -> ir.Value:
        whole = _uniform(self.scales)  # one scale a row stands there once, and the columns end where they end
        length = self.columns if whole else self.padded
        name = self.prefix + CODES
        codes = shared_initializer(
            self.model,
            ir.LazyTensor(
                partial(_typed, self.codes, TYPES[self.encoding], length, name),
                dtype=TYPES[self.encoding],
                shape=ir.Shape((length, self.rows)),
                name=name,
            ),
        )
        shape = (self.rows,) if whole else (self.blocks, self.rows)
        scales = self._initializer(SCALES, self.scale_type, shape, partial(_turned, self.scales, whole))
        attributes = dict(axis=1) if whole else dict(axis=0, block_size=self.block)
        return self._product(
            self.add("DequantizeLinear", [codes, scales], attributes, self.scale_type, (length, self.rows)), length
        )

    def _gathered(self) -> ir.Value:
        shape, int32 = (self.padded, self.rows), ir.DataType.INT32
        codes = self._initializer(CODES, UINT8, shape, partial(_unpacked, self.codes, self.bits))
        scales = self._initializer(
            SCALES, self.scale_type, (self.blocks, 1, self.rows), partial(_by_block, self.scales)
        )
        table = value_table(self.model, self.encoding)
        looked_up = self.add("Gather", [table, self.add.cast(codes, int32)], {}, FLOAT, shape)
        cut = self.add.reshape(looked_up, (self.blocks, self.block, self.rows))
        scaled = self.add("Mul", [cut, self.add.cast(scales, FLOAT)], {}, FLOAT, cut.shape)
        return self._product(self.add.reshape(scaled, shape), self.padded)

    def _bitsandbytes(self) -> ir.Value:
        size = self.rows * self.columns
        codes = self._initializer(CODES, UINT8, (size // 2,), partial(_high_first, self.codes))
        scales = self._initializer(SCALES, FLOAT, (size // self.block,), partial(_flat, self.scales))
        numbers = dict(K=self.columns, N=self.rows, block_size=self.block, quant_type=NF4)
        return self._contrib("MatMulBnb4", [self.x, codes, scales], numbers)

    def _integers(self) -> ir.Value:
        shape = (self.rows, self.blocks, self.block)
        codes = self._initializer(f"{DOUBLED}.codes", UINT8, shape, partial(_integers, self.codes, self.encoding))
        scales = self._initializer(f"{DOUBLED}.scales", FLOAT, (self.rows, self.blocks), partial(_halves, self.scales))
        numbers = dict(K=self.columns, N=self.rows, bits=8, block_size=self.block, accuracy_level=1)
        return self._contrib("MatMulNBits", [self.x, codes, scales], numbers)

    def _contrib(self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int]) -> ir.Value:
        self.model.graph.opset_imports["com.microsoft"] = 1
        return self.add(op_type, inputs, attributes, self.x.dtype, self.shape, domain="com.microsoft")


def _uniform(scales: ir.TensorProtocol) -> bool:
    held = scales.numpy()
    return bool((held == held[:, :1]).all())


def _unpacked(codes: ir.TensorProtocol, bits: int) -> np.ndarray:
    """uint8 [K', N]."""
    packed = codes.numpy()
    width = packed.shape[1] * packed.shape[2] * 8 // bits
    return unpack_bits(packed.reshape(packed.shape[0], -1), bits, width).T


def _typed(codes: ir.TensorProtocol, dtype: ir.DataType, length: int, name: str) -> ir.Tensor:
    turned = np.ascontiguousarray(_unpacked(codes, 8)[:length])
    return ir.Tensor(turned.view(dtype.numpy()), dtype=dtype, name=name)


def _turned(scales: ir.TensorProtocol, whole: bool) -> np.ndarray:
    held = scales.numpy()
    return held[:, 0] if whole else held.T


def _by_block(scales: ir.TensorProtocol) -> np.ndarray:
    return scales.numpy().T[:, None]


def _flat(scales: ir.TensorProtocol) -> np.ndarray:
    return scales.numpy().astype(np.float32).reshape(-1)


def _high_first(codes: ir.TensorProtocol) -> np.ndarray:
    packed = codes.numpy().reshape(-1)
    return packed << np.uint8(4) | packed >> np.uint8(4)


def _integers(codes: ir.TensorProtocol, encoding: str) -> np.ndarray:
    packed = codes.numpy()
    rows, blocks = packed.shape[:2]
    return as_integers(encoding)[_unpacked(codes, ENCODINGS[encoding].bits).T].reshape(rows, blocks, -1)


def _halves(scales: ir.TensorProtocol) -> np.ndarray:
    return scales.numpy().astype(np.float32) * np.float32(0.5)
