"""Graph passes, one per file, and the ordered lists in which they run.

A Program pass edits a torch.fx graph in place and is shared by every backend; it must leave the function that the
graph computes unchanged. A model pass edits an onnx_ir model after lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from exporters.passes.cancel_layout import cancel_layout
from exporters.passes.drop_identities import drop_identities
from exporters.passes.fold_rope import fold_rope
from exporters.passes.fuse_epilogues import fuse_epilogues
from exporters.passes.fuse_projection import fuse_projection
from exporters.passes.fuse_residual import fuse_residual
from exporters.passes.fuse_swiglu import fuse_swiglu
from exporters.passes.merge_equal import merge_equal
from exporters.passes.pack_qkv import pack_qkv
from exporters.passes.spell_indexing import spell_indexing
from exporters.program import Program

GraphPass = Callable[[torch.fx.Graph], None]

#: What every language model goes through before any backend sees it.
PROGRAM: Sequence[GraphPass] = (
    spell_indexing,  # indexing by tensors -> slices and lookups
    drop_identities,  # aliases, whole slices, and joins with nothing
    merge_equal,  # one call of each joined projection, one gather of the RoPE angles
    fold_rope,  # rotation of query and key -> the attention op's own tables
    cancel_layout,  # transposes and reshapes that undo each other, which the rotation kept apart
    pack_qkv,  # three slices of one projection -> attention reads the projection itself
    fuse_residual,  # add + norm -> one op with two results
    fuse_swiglu,  # silu(gate) * up over the two halves of one projection
)
#: What a program goes through for a backend that has our CUDA kernels.
KERNELS: Sequence[GraphPass] = (
    fuse_projection,  # quantised products take the norm in front, and SwiGLU or the residual sum behind
    fuse_epilogues,  # group norm + SiLU, and a convolution's bias + Snake
)


def apply(program: Program, passes: Sequence[GraphPass]) -> Program:
    """Runs ``passes`` in order over the program's graph, which is checked and cleaned after each."""
    module = program.exported.graph_module
    for edit in passes:
        edit(module.graph)
        module.graph.eliminate_dead_code()
        module.graph.lint()
    module.recompile()
    return program
