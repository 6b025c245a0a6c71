"""What an ONNX model goes through after lowering: ordered lists of passes over an onnx_ir model."""

from __future__ import annotations

from exporters.passes.attach_head import attach_head
from exporters.passes.attach_weights import attach_weights
from exporters.passes.drop_unused import drop_unused
from exporters.passes.fuse_experts import fuse_experts, fuse_experts_fast
from exporters.passes.map_tables import map_tables
from exporters.passes.mark_origins import mark_origins
from exporters.passes.name_nodes import name_nodes
from exporters.passes.pack_words import pack_words
from exporters.passes.part_products import part_products
from exporters.passes.set_accuracy_level import set_fast_accuracy
from exporters.passes.settle_reshapes import settle_reshapes
from exporters.passes.simplify_model import simplify_model
from exporters.passes.spell_gemms import spell_gemms
from exporters.passes.spell_integers import spell_integers
from exporters.passes.spell_lookups import spell_lookups
from exporters.passes.spell_products import spell_products
from exporters.passes.spell_tables import spell_tables
from exporters.passes.split_bytes import split_bytes
from exporters.passes.transpose_tables import transpose_tables
from exporters.passes.transpose_weights import transpose_weights
from exporters.passes.turn_codes import turn_codes
from exporters.passes.type_codes import type_codes
from exporters.passes.untie_tables import untie_tables
from exporters.tensorrt_functions import add_functions

_ALL = (
    mark_origins,  # node metadata -> the Program's own names, and nothing of the build machine
    attach_weights,  # initializers without values -> the Program's lazily loaded constants
    settle_reshapes,  # computed targets -> constants with one free dimension
    simplify_model,  # constants folded, unused nodes dropped, equal ones merged
    spell_tables,  # products with codes of a table -> the form that the runtime has for the encoding
)

_FLOAT_PRODUCTS = (
    transpose_weights,  # x @ W.T -> x @ W', with W' written transposed
    transpose_tables,  # the head's table -> transposed, and its rows looked up as columns
    spell_gemms,  # Gemm -> FusedMatMul
    map_tables,  # float tables -> read where their file is mapped
)
#: What `float_tables` of a profile asks to be left out, so that ONNX Runtime packs a table of floats as it does others.
MAPPED_TABLES = (transpose_tables, map_tables)

#: For ONNX Runtime, float32 activations.
FUSED = (
    *_ALL,
    fuse_experts,  # experts executed densely -> the operator that multiplies with the chosen ones alone
    spell_integers,  # rounded inputs of 8-bit matrices -> integer products
    *_FLOAT_PRODUCTS,
    split_bytes,  # 8-bit matrices -> two 4-bit planes, for which there is a kernel
    untie_tables,  # tables that are packed -> another name for their look-ups
)
#: For ONNX Runtime, int8 activations in the quantised products.
FUSED_FAST = (
    *_ALL,
    fuse_experts_fast,
    spell_integers,
    *_FLOAT_PRODUCTS,
    part_products,  # a result that is cut into equal parts -> a product for each
    drop_unused,  # the matrices as they were joined
    untie_tables,
    set_fast_accuracy,  # the products' own choice of int8 activations
)
#: For TensorRT's parser: explicit types, and functions in the place of what ONNX has no operator for.
TENSORRT = (
    *_ALL,
    spell_products,  # quantised products -> DequantizeLinear of signed codes, and a correction for zero points
    spell_lookups,  # rows of a table of codes -> integer operators
    drop_unused,  # the codes as they were packed
    transpose_weights,
    name_nodes,  # by the checkpoint's modules, for the compiler's list of layers
    add_functions,  # bodies in standard operators for TensorRT's own layers and for our kernels
)
#: The same with our kernels as nodes, whose plugins take the place of the functions on the device.
TENSORRT_FUSED = (
    *_ALL,
    attach_head,  # the product that makes the logits -> the kernel that picks the largest of a range of rows
    pack_words,  # weights of our nodes -> int32 words; no input is left out
    spell_products,
    spell_lookups,
    drop_unused,
    transpose_weights,
    name_nodes,
    add_functions,
)
#: Standard operators only.
STANDARD = (
    *_ALL,
    type_codes,  # packed bytes -> UINT4/UINT8 of DequantizeLinear
    turn_codes,  # codes that are read transposed -> written so
    drop_unused,
    transpose_weights,
    transpose_tables,
)
