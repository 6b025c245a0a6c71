"""The TensorRT backend: strongly typed ONNX that a device builds its engine from, proven before it gets there.

Forms:
    typed/fp16    float16 activations, weights as INT4/INT8 with DequantizeLinear, TensorRT's own layers
    typed/exact   the same in float32, for what float16 breaks
    fused/fp16    our kernels (kernels/cuda) as plugins for quantised products, head, attention, norms and lookups
    int8/fp16     decoders whose convolutions the build quantises to INT8 with the student's own signals
No build machine can make another device's engine, so an artifact is the ONNX file; for TensorRT-RTX, whose compiler
needs no GPU, the engine is one as well (exporters/tensorrt_rtx.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch.utils._pytree import tree_leaves

from exporters import onnx_observation, ops, passes, tensorrt_rtx
from exporters.backends import Job, Kind, new_artifact
from exporters.encodings import INTEGER
from exporters.external_data import WeightFile
from exporters.half import to_half
from exporters.inheritance import StoredMatrix
from exporters.onnx_lowering import to_onnx
from exporters.ops.tensorrt import lowerings
from exporters.passes import model_passes
from exporters.passes.attach_head import CANDIDATES, IDS, ROWS, VALUES
from exporters.passes.drop_unused import drop_unused
from exporters.passes.quantise_convolutions import quantise_convolutions
from exporters.program import Program, sources
from exporters.tensorrt_functions import plugins
from exporters.tensorrt_generations import RTX_GENERATION, Generation, generation_of
from exporters.tensorrt_int8 import plan_int8
from exporters.tensorrt_kernels import variants, write_kernels
from exporters.tensorrt_layers import patterns
from exporters.tensorrt_weights import read_matrices
from exporters.traffic import stored_precision
from runtimes.bundle import Artifact

if TYPE_CHECKING:
    from device_profiles import Profile

TYPED, FUSED, INT8 = "typed", "fused", "int8"
#: Components that our kernels are for.
KERNEL_ENTRIES = ("lm", "image_decoder", "audio_decoder")
#: Tokens of a prefill for which TensorRT chooses its kernels, and the most that one run takes: longer ones are cut.
USUAL_PREFILL, LONGEST_PREFILL = 64, 512
#: Pictures in one run at most, and times the usual length of a signal.
MOST_BATCH, LENGTHS = 8, 16


class TensorRtExporter:
    """Exporter protocol for TensorRT and TensorRT-RTX."""

    name = "tensorrt"

    def forms(self, program: Program) -> tuple[Kind, ...]:
        """See Exporter."""
        with_kernels = ((FUSED, "fp16"),) if program.entry in KERNEL_ENTRIES else ()
        with_int8 = ((INT8, "fp16"),) if program.entry.endswith("_decoder") else ()
        return (*with_kernels, (TYPED, "fp16"), (TYPED, "exact"), *with_int8)

    def unsupported(self, program: Program, profile: Profile, kind: Kind) -> list[str]:
        """See Exporter."""
        generation = generation_of(profile)
        reasons = []
        if profile.sm not in tensorrt_rtx.CAPABILITIES:
            reasons.append(f"{program.entry}: {profile.sm} is no architecture that TensorRT files are made for here")
        if generation.name == RTX_GENERATION and not tensorrt_rtx.installed():
            reasons.append(f"{program.entry}: engines of TensorRT-RTX need the package {tensorrt_rtx.PACKAGE}")
        if kind[0] == FUSED and not generation.plugins:
            reasons.append(f"{program.entry}: {profile.tensorrt_version} takes no plugins, which our kernels come as")
        for name, matrix in program.inherited.items():
            if matrix.encoding != INTEGER:
                continue  # a table, which every generation gathers from
            if matrix.bits not in (4, 8) and kind[0] == FUSED:
                reasons.append(f"{program.entry}: {name} has {matrix.bits} bits, our kernels have 4 and 8")
            elif (
                matrix.bits == 8 and kind[0] == TYPED and not generation.int8_blocks and not _per_channel(program, name)
            ):
                reasons.append(
                    f"{program.entry}: {name} has 8-bit weights in blocks, TensorRT {profile.tensorrt_version} "
                    f"dequantises INT8 per channel alone; our kernels ({FUSED}) take them"
                )
        return reasons

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes tensorrt/<entry>.<form>.<mode>.onnx for each kind, and one weight file for all of them; every file is
        parsed, and its engine built, where the compiler is installed."""
        folder = job.out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        generation = generation_of(job.profile)
        written = []
        with WeightFile(folder / f"{job.program.entry}.data", job.progress) as weights:
            for kind in job.kinds:
                program, model = lower(job.program, kind, generation)
                int8 = _quantise(job, model, generation) if kind[0] == INT8 else {}
                weights.adopt(model)
                path = folder / f"{program.entry}.{'.'.join(kind)}.onnx"
                ir.save(model, path)
                options = _options(program, job.profile, generation, model) | int8
                files = [path, weights.path, *_compile(path, model, job.profile, generation, options)]
                relative = [file.relative_to(job.out).as_posix() for file in files]
                operators = Counter(node.op_type for node in model.graph)
                precision = _precision(job.program, kind)
                written.append(new_artifact(program, self.name, kind, relative, precision, operators, options=options))
        return tuple(written)

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Writes the kernels' PTX and the plugins' sources, where an artifact calls our kernels."""
        write_kernels(profile, artifacts, out)

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """See Exporter."""
        return read_matrices(folder / artifact.model, program.inherited)

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """See Exporter."""
        return onnx_observation.observe(folder, artifact, nodes, out)


def lower(program: Program, kind: Kind, generation: Generation) -> tuple[Program, ir.Model]:
    """The program in the kind's dtype, and its ONNX model whose large initializers are still to be loaded."""
    form, mode = kind
    tables = _rope_tables(program) if form == FUSED else ()  # our attention rotates in float32
    typed = program if mode == "exact" else to_half(program, lambda name: name in tables)
    names = None if typed is program else sources(typed.exported)
    if form == FUSED:
        typed = passes.apply(typed, passes.KERNELS)
    table = lowerings(FUSED if form == FUSED else generation.target, generation.group_norm)
    edits = model_passes.TENSORRT_FUSED if form == FUSED else model_passes.TENSORRT
    model = to_onnx(typed, table, generation.opset, edits, names)
    model.ir_version = generation.ir_version
    return typed, model


def _quantise(job: Job, model: ir.Model, generation: Generation) -> dict[str, Any]:
    """Quantises the convolutions of ``model`` in place; what an artifact says of it."""
    plain = lower(job.program, (TYPED, "exact"), generation)[1]
    plan = plan_int8(plain, job.samples(), job.program.entry)
    quantise_convolutions(model, plan.ranges)
    drop_unused(model)
    return {"float_layers": list(plan.floating), "snr_db": round(plan.snr_db, 2)}


def _per_channel(program: Program, name: str) -> bool:
    """Whether a matrix has one scale a row and no zero points. Its scales are read, which are few."""
    scales = program.constants[f"{name}.scales"].load()
    return f"{name}.zeros" not in program.constants and bool((scales == scales[:, :1]).all())


def _rope_tables(program: Program) -> set[str]:
    """Names of the constants that attention rotates by."""
    names = program.exported.graph_signature.inputs_to_buffers
    calls = (node for node in program.exported.graph.nodes if node.target is ops.kv_attention.overload)
    return {names[table.name] for call in calls for table in call.args[6:8] if table is not None}


def _compile(
    path: Path, model: ir.Model, profile: Profile, generation: Generation, options: dict[str, Any]
) -> list[Path]:
    """Has the file parsed and compiled; adds what came of it to ``options``, and returns the files that it made.

    A file whose nodes are our kernels is only parsed, through their bodies: TensorRT-RTX takes no plugins.
    """
    if not tensorrt_rtx.installed():
        options["compiled"] = {"status": "pending-device", "compiler": f"{tensorrt_rtx.PACKAGE}, which is not here"}
        return []
    built = tensorrt_rtx.compile_file(path, profile.sm or "", options["ranges"], engine=not options["plugins"])
    if not built.engine:
        options["compiled"] = {"status": "parsed", "compiler": built.compiler}
        return []
    options["compiled"] = {
        "status": "built" if generation.name == RTX_GENERATION and built.own else "proxy",
        "compiler": built.compiler,
        "capability": built.capability,
        "layers": len(built.layers),
        "patterns": patterns(model, built.layers),
    }
    layers = path.with_suffix(".layers.json")
    layers.write_text(json.dumps([asdict(layer) for layer in built.layers], indent=1) + "\n", "utf-8")
    if options["compiled"]["status"] == "proxy":
        return [layers]
    engine = path.with_suffix(".engine")
    engine.write_bytes(built.engine)
    options["engine"] = f"{path.parent.name}/{engine.name}"
    return [layers, engine]


def _options(program: Program, profile: Profile, generation: Generation, model: ir.Model) -> dict[str, Any]:
    needed = list(plugins(model))
    states = "delta" if generation.target == "decomposed" and not needed else "aliased"
    head = {"rows": ROWS, "values": VALUES, "ids": IDS, "k": CANDIDATES}
    return {
        **({"head": head} if "EdgeHead" in needed else {}),
        "generation": generation.name,
        "sm": profile.sm,
        "plugins": needed,
        **({"kernels": variants(model)} if needed else {}),
        "ranges": _ranges(program),
        **({"states": states} if program.states else {}),
    }


def _ranges(program: Program) -> dict[str, dict[str, list[list[int]]]]:
    """Shape ranges by name: input -> its smallest, usual and largest shape."""
    if program.states:
        capacity = program.states[0].shape[2]
        longest = min(LONGEST_PREFILL, capacity)
        kinds = {"decode": (1, 1, 1), "prefill": (1, min(USUAL_PREFILL, longest), longest)}
        return {name: {"ids": [[1, size] for size in sizes]} for name, sizes in kinds.items()}
    return {"any": {spec.name: _range(program, index) for index, spec in enumerate(program.inputs)}}


def _range(program: Program, index: int) -> list[list[int]]:
    """Smallest, usual and largest shape of an input: around what was traced, within what tracing allows."""
    placeholder = [node for node in program.exported.graph.nodes if node.name in _user_inputs(program)][index]
    shapes: list[list[int]] = [[], [], []]
    for axis, size in enumerate(program.inputs[index].shape):
        traced = tree_leaves(program.exported.example_inputs)[index].shape[axis]
        smallest = largest = usual = int(traced)
        if isinstance(size, str):
            allowed = program.exported.range_constraints[placeholder.meta["val"].shape[axis].node.expr]
            # A batch is usually one picture; a length is usually what was traced.
            batch = axis == 0
            usual = 1 if batch else usual
            smallest = 1 if batch else int(allowed.lower)
            largest = int(min(allowed.upper, MOST_BATCH if batch else LENGTHS * usual))
        for found, value in zip(shapes, (smallest, usual, largest), strict=True):
            found.append(value)
    return shapes


def _user_inputs(program: Program) -> tuple[str, ...]:
    return tuple(program.exported.graph_signature.user_inputs)


def _precision(program: Program, kind: Kind) -> dict[str, str]:
    if kind[0] == INT8:
        return {"weights": "int8 per channel", "activations": "int8 in convolutions, else float16"}
    return {"weights": stored_precision(program), "activations": "float32" if kind[1] == "exact" else "float16"}
