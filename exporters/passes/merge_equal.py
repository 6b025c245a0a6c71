"""Merges calls that compute the same value.

Given:  a = linear(x, W)[..., :4];  b = linear(x, W)[..., 4:]
Result: y = linear(x, W);  a = y[..., :4];  b = y[..., 4:]
"""

from __future__ import annotations

from torch.fx import Graph
from torch.fx.passes.dialect.common.cse_pass import CSEPass


def merge_equal(graph: Graph) -> None:
    """Runs PyTorch's common-subexpression elimination to its fixed point, in place."""
    module = graph.owning_module
    while (result := CSEPass()(module)).modified:
        module.graph = result.graph_module.graph
