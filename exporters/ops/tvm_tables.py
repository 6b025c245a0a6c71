"""TVM's lowerings of weights whose codes stand for the values of a table.

fp4 is multiplied by the kernel for integers: twice each value with half the scale is the same weight
(encodings.as_integers). What no integers stand for is looked up when the weights are written, and multiplied as the
float32 matrix that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from exporters import cpu_layout
from exporters.blocks import look_up, unpack_bits
from exporters.cpu_layout import PANEL
from exporters.encodings import as_integers
from exporters.inheritance import FLOAT, StoredMatrix
from exporters.program import Inherited
from exporters.tvm_fusion import arguments

if TYPE_CHECKING:
    from exporters.tvm_import import Emitter

#: Encodings that integers stand for.
WHOLE = frozenset({"float4_e2m1fn"})
#: Layouts of a parameter: integers and their scales for the kernel, float32 for a product and for lookups.
DOUBLED, HALVED, DENSE, ROWS = "doubled", "halved", "looked up", "rows"


def table_linear(emit: Emitter, node: fx.Node) -> Any:
    """``edge::table_linear``."""
    given = arguments(node)
    x, bias, rows = emit.float32(given["x"]), emit.value(given["bias"]), given["codes"].meta["val"].shape[0]
    shape = (*emit.shape(x)[:-1], rows)
    if given["encoding"] in WHOLE:
        weight, block = _integers(emit, given)
        y = emit.call("edge_quantized_linear", [x, *weight, bias, 8, block, int(emit.fast)], [shape], node)
    else:
        panels = (-(-rows // PANEL), given["columns"], PANEL)
        weight = _floats(emit, given, DENSE, panels, cpu_layout.pack_linear)
        y = emit.call("edge_linear", [x, weight, bias], [shape], node)
    return emit.like(y, given["x"])


def table_embedding(emit: Emitter, node: fx.Node) -> Any:
    """``edge::table_embedding``."""
    given = arguments(node)
    ids, count = emit.integer(given["ids"]), given["codes"].meta["val"].shape[0]
    if given["encoding"] not in WHOLE:
        return emit.rows(_floats(emit, given, ROWS, (count, given["columns"]), np.ascontiguousarray), ids)
    weight, block = _integers(emit, given)
    shape = (*emit.shape(ids), given["columns"])
    return emit.call("edge_quantized_embedding", [ids, *weight, count, 8, block], [shape], node)


def _integers(emit: Emitter, given: Mapping[str, Any]) -> tuple[list[Any], int]:
    """Codes, scales and no zero points in the layout of the kernels; and columns per block."""
    rows, blocks, width = given["codes"].meta["val"].shape
    panels, block = -(-rows // PANEL), 2 * width

    def codes(packed: np.ndarray) -> np.ndarray:
        each = unpack_bits(packed.reshape(rows, -1), 4, blocks * block)
        integers = as_integers(given["encoding"])[each].reshape(rows, blocks, block)
        return cpu_layout.pack_quantized(integers, np.zeros((rows, blocks)), None, 8).codes

    parts = [
        emit.weight(given["codes"], DOUBLED, "uint32", (panels, blocks * block // 4, PANEL), codes),
        emit.weight(
            given["scales"],
            HALVED,
            "float32",
            (panels, blocks, PANEL),
            lambda scales: cpu_layout.pack_linear(scales * np.float32(0.5)),
        ),
        emit.value(None),
    ]
    return parts, block


def _floats(
    emit: Emitter, given: Mapping[str, Any], layout: str, shape: tuple[int, ...], pack: Callable[..., np.ndarray]
) -> Any:
    scales = emit.values[emit.constants[given["scales"].name]]

    def load(codes: np.ndarray) -> np.ndarray:
        return pack(look_up(codes, scales.load(), given["encoding"], given["columns"]))

    return emit.weight(given["codes"], layout, "float32", shape, load)


def stored(file: Any, held: Collection[str], prefix: str, layout: Inherited) -> StoredMatrix | None:
    """A matrix of a table as a file of parameters holds it; ``held``: names of those that the library reads."""
    rows = sum(layout.rows)
    names = [f"{prefix}.codes:{DOUBLED}", f"{prefix}.scales:{HALVED}"]
    if set(names) <= set(held):
        packed = cpu_layout.PackedWeight(*map(file.get_tensor, names), None)
        codes, scales, _ = cpu_layout.unpack_quantized(packed, 8, rows)
        return StoredMatrix(codes.reshape(rows, -1), scales, None, 8, layout.block)
    for kind, unpack in ((DENSE, lambda values: cpu_layout.unpack_linear(values, rows)), (ROWS, np.asarray)):
        if f"{prefix}.codes:{kind}" in held:
            weight = unpack(file.get_tensor(f"{prefix}.codes:{kind}"))
            return StoredMatrix(weight, np.ones((rows, 1), np.float32), None, 32, layout.columns, FLOAT)
    return None
