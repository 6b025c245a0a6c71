"""How many bytes a decode step reads, and how a program's weights are stored: facts that every backend reports."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporters import ops
from exporters.encodings import INTEGER
from exporters.ops.quantize_activation import FORMATS
from exporters.program import Program


def bytes_per_token(program: Program) -> int | None:
    """Bytes of weights that one decode step reads; the KV cache comes on top, by how full it is.

    A table that is only looked up counts as nothing, a tied one is read whole by the head.
    """
    if program.entry != "lm":
        return None
    return sum(program.constants[name].nbytes for name in _read_whole(program))


def _read_whole(program: Program) -> Iterator[str]:
    """Names of the constants that some node reads whole, rather than a few rows of."""
    lookups = {op.overload for op in (ops.quantized_embedding, ops.table_embedding, ops.rope_angles, ops.kv_attention)}
    lookups.add(torch.ops.aten.embedding.default)
    signature = program.exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.exported.graph.nodes:
        if node.name in names and any(user.target not in lookups for user in node.users):
            yield names[node.name]


def narrowest_input(program: Program) -> int | None:
    """Bits that the most coarsely rounded input of a layer is rounded to, None where none is rounded."""
    op = ops.quantize_activation.overload
    nodes = program.exported.graph.find_nodes(op="call_function", target=op)
    return min((FORMATS[node.args[1]].bits for node in nodes), default=None)


def stored_precision(program: Program) -> str:
    """The weights' own precision, as in "int4 g32 + int8 g256" or "nf4 g64", or "float32"."""
    kinds = sorted(
        {
            f"{f'int{matrix.bits}' if matrix.encoding == INTEGER else matrix.encoding} g{matrix.block}"
            for matrix in program.inherited.values()
        }
    )
    return " + ".join(kinds) or "float32"
