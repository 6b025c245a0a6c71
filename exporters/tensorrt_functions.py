"""Model-local functions: what TensorRT's own operators and our kernels compute, in standard operators.

A node of domain "trt" is a layer of TensorRT 11, one of domain "edge" a plugin of ours (kernels/cuda). With these
bodies in the file any ONNX runtime computes the same from the same bytes, so the very file that goes to the device
passes the parity gate before it gets there. The bodies are texts in ONNX's own syntax (onnx.parser), one file each:
exporters/onnx_functions/<name>.onnxtxt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources

import onnx.parser
import onnx_ir as ir

from exporters.ops.tensorrt import EDGE, TRT
from exporters.passes.context import Context

#: TensorRT's own operators.
NATIVE = frozenset({"TRT_KVCacheUpdate", "TRT_Attention"})
#: What the bodies share. What an attribute says reaches a helper as a tensor (width): TensorRT's parser loses
#: attributes handed from one function to the next.
HELPERS = frozenset({"EdgeFields", "EdgeWeights", "EdgeProduct", "EdgeNormalise", "EdgeRotate"})
#: Our kernels' nodes; the plugin of each has its name.
KERNELS = frozenset({
    "EdgeLinear", "EdgeLinearResidual", "EdgeNormLinear", "EdgeNormLinearSwiglu", "EdgeHead", "EdgeMergeTop",
    "EdgeAttention", "EdgeAttentionMerge", "EdgeCodebook", "EdgeGroupNormSilu", "EdgeBiasActivation",
})  # fmt: skip
_NAMES = {TRT: NATIVE, EDGE: HELPERS | KERNELS}


def add_functions(model: ir.Model, context: Context) -> None:
    """Adds the functions that the graph's nodes call, and those that these call, in place."""
    opset = model.graph.opset_imports[""]
    wanted = [(node.domain, node.op_type) for node in model.graph]
    while wanted:
        domain, name = wanted.pop()
        if name not in _NAMES.get(domain, ()) or (domain, name, "") in model.functions:
            continue
        function = _function(domain, name, opset)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[domain] = 1
        wanted += [(node.domain, node.op_type) for node in function]


def plugins(model: ir.Model) -> Iterator[str]:
    """Names of our kernels that the graph calls, each once, sorted."""
    yield from sorted({node.op_type for node in model.graph if node.domain == EDGE and node.op_type in KERNELS})


@cache
def body(name: str) -> str:
    """The text of a function, without its header."""
    return (resources.files("exporters") / "onnx_functions" / f"{name}.onnxtxt").read_text(encoding="utf-8")


def _function(domain: str, name: str, opset: int) -> ir.Function:
    imports = f'<domain: "{domain}", opset_import: ["" : {opset}, "{domain}" : 1]>'
    text = body(name)
    for helper in HELPERS:  # a call of another function names its domain
        text = text.replace(f"= {helper} ", f"= {domain}.{helper} ")
    return ir.from_proto(onnx.parser.parse_function(f"{imports}\n{text}"))
