"""The ops through the Core ML exporter's two forms, run by the interpreter of the saved package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from exporters.coreml_ import check
from exporters.coreml_convert import Recipe, convert
from exporters.program import Program
from runtimes.buckets import runs
from runtimes.coreml_format import load_package
from runtimes.coreml_interpreter import Function
from tests.exporters.op_cases import KERNELS_ONLY, Array, Case
from tests.exporters.runners import Runner, Step

RECIPES = {
    "coreml/exact": Recipe(half=False, channels=False, target="iOS18"),
    "coreml/fp16": Recipe(half=True, channels=True, target="iOS18"),
}
OPERATORS = {
    "add_rms_norm": "rsqrt",
    "bias_snake": "sin",
    "codebook_lookup": "gather",
    "group_norm_silu": "layer_norm",
    "kv_attention": "slice_update",
    "projection": "constexpr_blockwise_shift_scale",
    "quantize_activation": "round",
    "quantized_embedding": "constexpr_blockwise_shift_scale",
    "quantized_linear": "constexpr_blockwise_shift_scale",
    "rms_norm": "rsqrt",
    "rope_angles": "gather",
    "snake": "sin",
    "swiglu": "silu",
    "table_embedding": "constexpr_lut_to_dense",
    "table_linear": "constexpr_lut_to_dense",
}
#: coremltools writes a product and a sum by channel as a batch norm whose variance is 1 and whose epsilon 1e-5: 5e-6.
TOLERANCE = {
    "coreml/exact": {"exact": 0.0, "float32": 8e-6, "float16": 4e-3, "code": 0.1},
    "coreml/fp16": {"exact": 5e-4, "float32": 6e-3, "float16": 6e-3, "code": 0.1},
}
#: What float16 need not repeat: sizes of blocks that are lowered like their neighbours, and attention by fewer features
#: than other cases have.
LEFT_OUT = {
    "coreml/exact": KERNELS_ONLY,
    "coreml/fp16": KERNELS_ONLY
    | frozenset(
        f"quantized_linear-int{bits}-block{block}-{kind}-7x{3 * block}"
        for bits, kind, kept in ((4, "symmetric", 16), (4, "zeros", 32), (8, "symmetric", 64), (8, "zeros", 128))
        for block in (16, 32, 64, 128)
        if block != kept
    )
    | {
        "quantized_embedding-int4-block32-zeros-13x96",
        "quantized_embedding-int8-block32-symmetric-13x96",
        "kv_attention-separate-groups2",
        "kv_attention-packed-groups2",
        "kv_attention-packed-groups2-rope",
        "kv_attention-packed-groups2-width20",
        "kv_attention-packed-groups2-rope-window-softcap",
        "quantize_activation-int8-token-zeros",
        "quantize_activation-int8-group16",
        "quantize_activation-int8-static",
        "quantize_activation-int8-static-zeros",
        "quantize_activation-float8_e4m3fn-static",
        "table_embedding-float8_e4m3fn-block32-13x96",
        "table_embedding-float4_e2m1fn-block16-13x48",
        "table_linear-float8_e4m3fn-block128-7x384",
        "table_linear-float8_e4m3fn-block128-6x256-uniform",
        "table_linear-float8_e5m2-block64-7x192",
        "table_linear-float4_e2m1fn-block16-7x48-bias",
        "table_linear-nf4-block64-7x192",
    },
}
#: Masked slots are multiplied by 0, so they have to be finite: states start from zeros.
FILLER = 50.0
#: Compiled lengths of attention.
LENGTHS = (1, 4)


def refused(case: Case) -> str | None:
    return "the cache is written for one row" if "batch2" in case.label else None


def package(recipe: Recipe, case: Case, program: Program, size: int | None, path: Path) -> Function:
    """The op at one length, or (None) at any, written and loaded."""
    convert(program, recipe, None if size is None else {"S": size}, path)
    [held] = load_package(path).values()
    assert OPERATORS[case.op] in {operation.type for operation in held.operations}
    return Function(held, {})


def build(recipe: Recipe, case: Case, program: Program, folder: Path) -> Step:
    """Attention in packages of two lengths, which the session's way of cutting makes all others from; every other op
    in one that takes any length."""
    check(program)
    if not program.states:
        function = package(recipe, case, program, None, folder / "any.mlpackage")
        return lambda inputs: [function.run(inputs, {})[spec.name] for spec in program.outputs]
    functions = {n: package(recipe, case, program, n, folder / f"{n}.mlpackage") for n in LENGTHS}

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        held = {state.input: inputs[state.input] for state in program.states}
        length = inputs["query"].shape[1]
        start = int(inputs["last"][0]) + 1 - length
        out = []
        for first, size in runs(0, length, LENGTHS):
            rows = {name: value[:, first : first + size] for name, value in inputs.items() if name in case.dynamic}
            feeds = rows | {"last": np.array([start + first + size - 1], np.int32)}
            result, held = one(functions[size], feeds, held)
            out.append((first, result))
        whole = np.concatenate([rows for _, rows in out], 1)[:, -length:]
        for first, rows in out:
            whole[:, first : first + rows.shape[1]] = rows
        return [whole, *held.values()]

    def one(function: Function, feeds: dict[str, Array], held: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        if not recipe.half:
            results = function.run(feeds | held, {})
            return results["y0"], {state.input: results[state.output] for state in program.states}
        states = {}
        for state in program.states:  # wider and longer than the cache that it holds
            states[state.name] = np.full(function.states[state.name][1], FILLER, np.float32)
            states[state.name][tuple(map(slice, state.shape))] = held[state.input]
        result = function.run(feeds, states)["y0"]
        kept = {s.input: states[s.name][tuple(map(slice, s.shape))].astype(s.dtype) for s in program.states}
        return result, kept

    return step


RUNNERS = tuple(
    Runner(target, partial(build, recipe), OPERATORS, TOLERANCE[target], FILLER, refused, LEFT_OUT[target])
    for target, recipe in RECIPES.items()
)
