"""The TVM backend: Program to one shared library a component and mode, and one file of weights a component.

The library holds TVM's code and our C++ kernels (kernels/), the weights lie beside it in the layout of the kernels.
A language model is compiled for a few fixed lengths (decode is 1), each a function of the library; the caches are
arguments that the kernels write in place. Discretizers keep their free dimensions.

    compiled/exact  float32 throughout
    compiled/fast   quantised layers round their activations to int8
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tvm
import tvm_ffi
from safetensors import safe_open
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from exporters import cpu_layout, ops, tvm_gpu
from exporters.backends import Job, Kind, new_artifact
from exporters.blocks import unpack_bits
from exporters.inheritance import StoredMatrix
from exporters.ops import tvm_tables
from exporters.ops.tvm import lowerings, refused_cache
from exporters.program import Inherited, Program, specialise
from exporters.traffic import stored_precision
from exporters.tvm_import import Imported, import_program
from exporters.tvm_kernels import build_program, kernel_objects
from exporters.tvm_parameters import write_parameters
from exporters.tvm_targets import CpuTarget, cpu_target, kind_of
from runtimes.bundle import Artifact, TensorSpec

if TYPE_CHECKING:
    from device_profiles.schema import Profile

#: Lengths that a language model is compiled for, as far as its context goes: decode, then prompts.
LENGTHS = (1, 4, 16, 64, 256)
#: The kind of TVM's target that our C++ kernels are for.
CPU = "llvm"
#: Runs the artifacts without Python; kernels/tvm/program.
PROGRAM = "run_bundle"
RUNTIME = {"apache-tvm": tvm.__version__, "apache-tvm-ffi": tvm_ffi.__version__}
_NAMESPACES = ("aten", ops.NAMESPACE, "_operator")


class TvmExporter:
    """Exporter protocol for TVM."""

    name = "tvm"

    def forms(self, program: Program) -> tuple[Kind, ...]:
        """See Exporter."""
        # Without quantised weights int8 activations have nothing to multiply.
        return (("compiled", "exact"), ("compiled", "fast")) if program.inherited else (("compiled", "exact"),)

    def unsupported(self, program: Program, profile: Profile, kind: Kind) -> list[str]:
        """See Exporter."""
        reasons = [
            f"{program.entry}: state {state.name}: {reason}"
            for state in program.states
            if (reason := refused_cache(state.dtype)) is not None
        ]
        if kind_of(profile) is None:
            reasons.append(f"profile {profile.name} has no tvm_target")
        elif kind_of(profile) != CPU:
            reasons += tvm_gpu.refusals(program, profile)
            if kind[1] != "exact":
                reasons.append(f"{program.entry}: only the CPU kernels have a fast mode")
        for node in program.exported.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "aten") not in _NAMESPACES:
                reasons.append(
                    f"{program.entry}: node {node.name} calls {node.target}, which TVM has no kernel for;"
                    " give it a lowering in exporters/ops/tvm.py or a decomposition"
                )
        return reasons

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes tvm/<entry>.compiled.<mode>.so for each kind, and the weights once for all of them; for a GPU a .tar
        of object files, which the device's own toolchain links."""
        if kind_of(job.profile) != CPU:
            return tuple(self._export_gpu(job, kind) for kind in job.kinds)
        program, target = job.program, cpu_target(job.profile)
        folder = job.out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / f"{program.entry}.safetensors"
        parameters, artifacts = {}, []
        for form, mode in job.kinds:
            functions = import_functions(program, mode == "fast")
            library = folder / f"{program.entry}.{form}.{mode}.so"
            operators = compile_library(functions, target, library)
            for imported in functions.values():
                parameters |= imported.parameters
            files = tuple(path.relative_to(job.out).as_posix() for path in (library, weights, folder / PROGRAM))
            artifacts.append(describe(program, (form, mode), files, operators, target, functions))
        write_parameters(weights, parameters, job.progress)
        build_program(target, folder / PROGRAM)
        return tuple(artifacts)

    def _export_gpu(self, job: Job, kind: Kind) -> Artifact:
        program, profile = job.program, job.profile
        folder = job.out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        lengths = [length for length in LENGTHS if length <= program.states[0].shape[2]] if program.states else [1]
        functions = {}
        for length in lengths:
            fixed = specialise(program, dict.fromkeys(_symbols(program), length)) if program.states else program
            imported = import_program(fixed, tvm_gpu.lowerings(), tvm_gpu.references())
            sizes = relax.analysis.defined_symbolic_vars(imported.function)
            function = imported.function.bind_symbolic_vars({size: _example(program, size.name) for size in sizes})
            functions[f"run_{length}" if program.states else "run"] = replace(imported, function=function)
        library, weights = folder / f"{program.entry}.{'.'.join(kind)}.tar", folder / f"{program.entry}.safetensors"
        kernels = tvm_gpu.compile_objects({name: f.function for name, f in functions.items()}, profile, library)
        write_parameters(
            weights, {name: p for f in functions.values() for name, p in f.parameters.items()}, job.progress
        )
        files = tuple(path.relative_to(job.out).as_posix() for path in (library, weights))
        options = {
            "device": kind_of(profile),
            "arch": profile.arch,
            "parameters": files[1],
            "functions": {name.removeprefix("run").removeprefix("_"): name for name in functions},
        }
        return _artifact(program, kind, files, kernels, options)

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Nothing is shared."""

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """See Exporter. A weight counts where a function of the library names it among its arguments."""
        library = (folder / artifact.model).read_bytes()
        found = {}
        with safe_open(folder / artifact.options["parameters"], "numpy") as file:
            held = {name for name in file.keys() if _serialised(name) in library}  # noqa: SIM118
            for prefix, layout in program.inherited.items():
                if "device" in artifact.options:
                    found[prefix] = _as_captured(file, prefix, layout)
                    continue
                names = [f"{prefix}.{part}:panels" for part in ("codes", "scales", "zeros")]
                codes, scales, zeros = (file.get_tensor(n) if n in held else None for n in names)
                if codes is None or scales is None:
                    if (table := tvm_tables.stored(file, held, prefix, layout)) is not None:
                        found[prefix] = table
                    continue
                rows = sum(layout.rows)
                packed = cpu_layout.PackedWeight(codes, scales, zeros)
                blocks, values, points = cpu_layout.unpack_quantized(packed, layout.bits, rows)
                count = values.shape[1]
                found[prefix] = StoredMatrix(
                    unpack_bits(blocks.reshape(rows, -1), layout.bits, count * layout.block),
                    values,
                    None if points is None else unpack_bits(points, layout.bits, count),
                    layout.bits,
                    layout.block,
                    order=file.get_tensor(order) if (order := f"{prefix}.order") in held else None,
                )
        return found

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """See Exporter. The library itself is what runs: each kernel is told its node's name, and the session keeps
        the first result of those asked for. A prompt of several runs shows its last one."""
        library = (folder / artifact.model).read_bytes()
        found = {node: f"observed.{node}" for node in nodes if _serialised(node) in library}
        for file in artifact.files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, out / file)
        values = {node.name: node.meta["val"] for node in program.exported.graph.nodes if node.name in found}
        specs = tuple(_spec(found[name], value) for name, value in values.items())
        options = {**artifact.options, "observed": {found[name]: name for name in values}}
        return replace(artifact, outputs=(*artifact.outputs, *specs), options=options), found


def _as_captured(file: Any, prefix: str, layout: Inherited) -> StoredMatrix:
    """A matrix in the layout of ``edge::quantized_linear``, as code for GPUs reads it."""
    codes, scales = file.get_tensor(f"{prefix}.codes"), file.get_tensor(f"{prefix}.scales")
    rows, blocks = scales.shape
    zeros = file.get_tensor(f"{prefix}.zeros") if f"{prefix}.zeros" in file.keys() else None  # noqa: SIM118
    return StoredMatrix(
        unpack_bits(codes.reshape(rows, -1), layout.bits, blocks * layout.block),
        scales,
        None if zeros is None else unpack_bits(zeros, layout.bits, blocks),
        layout.bits,
        layout.block,
        order=file.get_tensor(f"{prefix}.order") if f"{prefix}.order" in file.keys() else None,  # noqa: SIM118
    )


def _symbols(program: Program) -> set[str]:
    return {size for spec in program.inputs for size in spec.shape if isinstance(size, str)}


def _example(program: Program, symbol: str) -> int:
    """The fixed size of a symbolic one: batches are 1, a length is that of the capture."""
    for spec, node in zip(program.inputs, _inputs(program), strict=False):
        for named, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(named, str) and str(size) == symbol:
                return 1 if named == "B" else int(size.node.hint)
    raise AssertionError(f"{program.entry}: no input has the size {symbol}")


def _inputs(program: Program) -> list[torch.fx.Node]:
    named = set(program.exported.graph_signature.user_inputs)
    return [node for node in program.exported.graph.nodes if node.name in named]


def _spec(name: str, value: Any) -> TensorSpec:
    """Of a node's first result; what is symbolic in the Program stays so."""
    first = value[0] if isinstance(value, (list, tuple)) else value
    shape = tuple(size if isinstance(size, int) else str(size) for size in first.shape)
    return TensorSpec(name, str(first.dtype).removeprefix("torch."), shape)


def import_functions(program: Program, fast: bool, lengths: Sequence[int] = LENGTHS) -> dict[str, Imported]:
    """Name of a function of the library -> what it computes: one per length of a program with states, else one."""
    kernels = lowerings()
    references = {op.overload: op.reference for op in ops.REGISTRY.values() if op.overload not in kernels}
    if not program.states:
        return {"run": import_program(program, kernels, references, fast=fast)}
    capacity = program.states[0].shape[2]
    if _computes_with_sizes(program):  # TVM mixes types of integers where a length is symbolic
        return {
            f"run_{length}": import_program(specialise(program, {"S": length}), kernels, references, fast=fast)
            for length in lengths
            if length <= capacity
        }
    imported = import_program(program, kernels, references, fast=fast)
    symbols = relax.analysis.defined_symbolic_vars(imported.function)
    return {
        f"run_{length}": replace(
            imported,
            # A variable may stand in one function only.
            function=copy_with_new_vars(imported.function.bind_symbolic_vars(dict.fromkeys(symbols, length))),
        )
        for length in lengths
        if length <= capacity
    }


def _computes_with_sizes(program: Program) -> bool:
    """Whether a length is a number in the graph, as in positions, rather than a shape alone."""
    return any(node.target is torch.ops.aten.sym_size.int for node in program.exported.graph.nodes)


def compile_library(functions: Mapping[str, Imported], target: CpuTarget, path: Path) -> dict[str, int]:
    """Writes the library; how often each operator is called, by one function."""
    module = tvm.IRModule({name: f.function.with_attr("global_symbol", name) for name, f in functions.items()})
    device = tvm.target.Target(dict(target.tvm))
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.compile(module, device, relax_pipeline=relax.pipeline.get_default_pipeline(device))
    built.export_library(
        str(path),
        fcompile=tvm.support.cc.cross_compiler(target.compiler),
        addons=[str(file) for file in kernel_objects(target)],
        options=["-s", "-Wl,--gc-sections"],
    )
    return _calls(next(iter(functions.values())).function)


def _calls(function: relax.Function) -> dict[str, int]:
    found: Counter[str] = Counter()

    def visit(node: Any) -> None:
        if isinstance(node, tvm.ir.Call) and isinstance(node.op, tvm.ir.Op):
            is_kernel = node.op.name == "relax.call_dps_packed"
            found[node.args[0].global_symbol if is_kernel else node.op.name] += 1

    relax.analysis.post_order_visit(function.body, visit)
    return dict(sorted(found.items()))


def _serialised(name: str) -> bytes:
    """A name as TVM writes it into a library, which may be another machine's and cannot be loaded here."""
    return len(name.encode()).to_bytes(8, "little") + name.encode()


def describe(
    program: Program,
    kind: Kind,
    files: tuple[str, ...],
    operators: Mapping[str, int],
    target: CpuTarget,
    functions: Mapping[str, Imported],
) -> Artifact:
    """The artifact whose library, weights and program are ``files``, relative to the bundle."""
    options = {
        "arch": target.arch,
        "isa": list(target.variant.isa),
        "kernels": target.variant.name,
        "cpu": target.tvm.get("mcpu"),
        "parameters": files[1],
        "program": files[2],
        "functions": {name.removeprefix("run").removeprefix("_"): name for name in functions},
    }
    return _artifact(program, kind, files, operators, options)


def _artifact(
    program: Program, kind: Kind, files: tuple[str, ...], operators: Mapping[str, int], options: Mapping[str, Any]
) -> Artifact:
    activations = "int8 per block" if kind[1] == "fast" else "float32"
    precision = {"weights": stored_precision(program), "activations": activations}
    return new_artifact(program, TvmExporter.name, kind, files, precision, operators, RUNTIME, options)
