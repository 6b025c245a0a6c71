"""The ops through the TVM exporter, run by TVM's virtual machine on this machine's variant of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from device_profiles import load_profile
from exporters.program import Program
from exporters.tvm_ import compile_library, describe, import_functions
from exporters.tvm_parameters import write_parameters
from exporters.tvm_targets import cpu_target
from runtimes.tvm_ import Loaded
from runtimes.tvm_files import aligned
from tests.exporters.op_cases import KERNELS_ONLY, Array, Case
from tests.exporters.runners import Runner, Step

#: op -> kernel
OPERATORS = {
    "add_rms_norm": "edge_add_rms_norm",
    "bias_snake": "edge_activate",
    "codebook_lookup": "edge_codebook_lookup",
    "group_norm_silu": "",
    "kv_attention": "edge_kv_attention",
    "projection": "edge_quantized_linear",
    "quantize_activation": "",
    "quantized_embedding": "edge_quantized_embedding",
    "quantized_linear": "edge_quantized_linear",
    "rms_norm": "edge_rms_norm",
    "rope_angles": "",
    "snake": "edge_activate",
    "swiglu": "edge_swiglu",
    "table_embedding": "",
    "table_linear": "",  # by its encoding, see TABLES
}
#: (op, whether integers stand for the values) -> kernel
TABLES = {
    ("table_embedding", False): "",
    ("table_embedding", True): "edge_quantized_embedding",
    ("table_linear", False): "edge_linear",
    ("table_linear", True): "edge_quantized_linear",
}
TOLERANCE = {"exact": 0.0, "float32": 3e-6, "float16": 3e-3, "code": 3e-6}
#: Every length of a run in the attention cases.
LENGTHS = (1, 2, 3, 5, 7, 9, 10)


def refused(case: Case) -> str | None:
    """Kernels write the cache in place, so it has to be of their type."""
    half = case.op == "kv_attention" and case.tolerance == "float16"
    return "float32 caches, not float16" if half else None


def build(case: Case, program: Program, folder: Path) -> Step:
    """The op imported, compiled and written as the exporter does it, loaded as a session does."""
    target = cpu_target(load_profile("host"))
    functions = import_functions(program, fast=False, lengths=LENGTHS)
    library, weights = folder / "op.so", folder / "op.safetensors"
    operators = compile_library(functions, target, library)
    wanted = OPERATORS[case.op] or TABLES.get((case.op, case.fixed.get("encoding") == "float4_e2m1fn"))
    assert not wanted or any(name.startswith(wanted) for name in operators), operators
    write_parameters(weights, {name: p for f in functions.values() for name, p in f.parameters.items()})
    artifact = describe(program, ("compiled", "exact"), (library.name, weights.name, ""), operators, target, functions)
    loaded = Loaded(artifact, library, weights)
    [dynamic] = [(name, axis) for name, axis in list(case.dynamic.items())[:1]]

    def step(inputs: Mapping[str, Array]) -> list[Array]:
        given = {}
        for name, value in inputs.items():  # a cache is written where it lies, if it lies on a cache line
            given[name] = aligned(value.shape, value.dtype)
            given[name][...] = value
        function = f"run_{inputs[dynamic[0]].shape[dynamic[1]]}" if program.states else "run"
        outputs = [np.array(output) for output in loaded.call(function, given)]
        return [*outputs, *(given[state.input] for state in program.states)]

    return step


RUNNERS = (Runner("tvm/compiled", build, OPERATORS, TOLERANCE, refused=refused, left_out=KERNELS_ONLY),)
