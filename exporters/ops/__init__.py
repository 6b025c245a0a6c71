"""The fused ops, one file each; importing this package registers them all in ``torch.ops.edge``."""

from exporters.ops._registry import BUILD, NAMESPACE, REGISTRY, FusedOp, described, layout
from exporters.ops.aten import aten_lowerings
from exporters.ops.codebook_lookup import codebook_lookup
from exporters.ops.decoder_epilogues import bias_snake, group_norm_silu
from exporters.ops.kv_attention import kv_attention, rope_angles
from exporters.ops.projection import projection
from exporters.ops.quantize_activation import quantize_activation
from exporters.ops.quantized_linear import quantized_embedding, quantized_linear
from exporters.ops.rms_norm import add_rms_norm, rms_norm
from exporters.ops.snake import snake
from exporters.ops.swiglu import swiglu
from exporters.ops.table_linear import table_embedding, table_linear

__all__ = [
    "BUILD",
    "NAMESPACE",
    "REGISTRY",
    "FusedOp",
    "add_rms_norm",
    "aten_lowerings",
    "bias_snake",
    "codebook_lookup",
    "described",
    "group_norm_silu",
    "kv_attention",
    "layout",
    "projection",
    "quantize_activation",
    "quantized_embedding",
    "quantized_linear",
    "rms_norm",
    "rope_angles",
    "snake",
    "swiglu",
    "table_embedding",
    "table_linear",
]
