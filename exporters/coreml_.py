"""The Core ML backend: Program to ``.mlpackage`` folders of the iOS 18 generation.

Forms and modes:
    mlprogram/exact    float32, the KV cache as inputs and outputs: proves the conversion
    mlprogram/fp16     float16, the KV cache as states that Core ML updates in place: what ships
    palettised/fp16    the same with float weights replaced by tables of their clusters: a re-quantisation, asked for
                       by the profile, and never of weights that the student has quantised itself
The language model has a function for each compiled length, an encoder or decoder one of flexible sizes and, in
float16, one of the size of one signal, since the Neural Engine takes fixed shapes alone. The functions of a package
share their weights.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporters import coreml_package as package
from exporters import ops
from exporters.backends import Job, new_artifact
from exporters.coreml_convert import Recipe, convert, state_shape
from exporters.errors import ExportError
from exporters.inheritance import StoredMatrix
from exporters.ops import coreml as column
from exporters.program import Program
from exporters.traffic import stored_precision
from runtimes.bundle import Artifact, TensorSpec

if TYPE_CHECKING:
    from device_profiles import Profile

logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns about packages and versions at every import

#: Compiled lengths of the language model; those that the cache is too short for are left out.
BUCKETS = (1, 4, 16, 64)
#: Deployment targets of the generation that has states, blocks of 4 bits and several functions.
TARGETS = ("iOS18", "macOS15", "tvOS18", "watchOS11", "visionOS2")
#: What ships in a bundle's docs/coreml.
GUIDES = Path(__file__).parent / "coreml_docs"
FORMS = (("mlprogram", "exact"), ("mlprogram", "fp16"), ("palettised", "fp16"))


class CoreMlExporter:
    """Exporter protocol for Core ML."""

    name = "coreml"

    def forms(self, program: Program) -> tuple[tuple[str, str], ...]:
        """The (form, mode) pairs that make sense for a program."""
        return tuple(form for form in FORMS if form[0] != "palettised" or not program.inherited)

    def unsupported(self, program: Program, profile: Profile, kind: tuple[str, str]) -> list[str]:
        """Reasons why ``kind`` cannot be made for ``profile``, each naming the node or the field; [] if it can."""
        reasons = []
        if profile.coreml_target is None:
            reasons.append(f"profile {profile.name} has no Core ML (coreml_target)")
        elif profile.coreml_target not in TARGETS:
            reasons.append(f"coreml_target {profile.coreml_target} is not one of {', '.join(TARGETS)}")
        if kind[1] == "fp16" and (searches := _searches(program)) > 1:
            reasons.append(
                f"{program.entry}: {searches} searches, each of what the one before it left: in float16 most codes are "
                "others, in PyTorch too"
            )
        return reasons + [f"{program.entry}: {reason}" for reason in _refused(program)]

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes coreml/<entry>.<form>.<mode>.mlpackage for each kind.

        Raises:
            ExportError: an operator without a Core ML form, or scales that float16 cannot hold, before anything is
                written.
        """
        check(job.program)
        if any(mode == "fp16" for _, mode in job.kinds):
            _check_scales(job.program)
        (job.out / self.name).mkdir(parents=True, exist_ok=True)
        guides = _write_guides(job.out) if job.program.states else ()
        written = (_write(job, form, mode) for form, mode in job.kinds)
        return tuple(replace(artifact, files=artifact.files + guides) for artifact in written)

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Nothing is shared."""

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """See Exporter."""
        return package.read_matrices((folder / artifact.model).parent, program.inherited)

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """See Exporter. The package itself stays as it is: the interpreter hands out any value of it."""
        source = (folder / artifact.model).parent
        package.copy(source, out / source.relative_to(folder))
        function = next(iter(artifact.options["functions"].values()))
        held = package.values_of_nodes(package.read(source), function)
        specs = {node.name: node for node in program.exported.graph.nodes}
        outputs, observed, turned = [], {}, []
        for name in nodes:
            node, bare = _producer(specs[name])
            if bare not in held:
                continue
            value, rank = held[bare]
            shape = _shape(node, specs[name])
            outputs.append(TensorSpec(f"observed.{name}", "float32", shape))
            observed[outputs[-1].name] = value
            if rank == 4 and len(shape) == 3:
                turned.append(outputs[-1].name)
        options = {**artifact.options, "observe": observed, "turned": turned}
        copied = replace(artifact, outputs=(*artifact.outputs, *outputs), options=options, raw={})
        return copied, {spec.name.removeprefix("observed."): spec.name for spec in outputs}


def check(program: Program) -> None:
    """Raises ExportError for the first node that has no Core ML form."""
    for reason in _refused(program):
        raise ExportError(reason, where=f"{program.entry} for Core ML", way_out="Leave Core ML out with --backends.")


# --- what there is no way for -------------------------------------------------------------------------------------


def _refused(program: Program) -> list[str]:
    """Nodes that have no Core ML form, by name."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as registry
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    reexpressed = column.decompositions(bool(program.states))
    reasons = []
    for node in program.exported.graph.nodes:
        if node.op != "call_function" or node.target in reexpressed:
            continue
        if not _known(node.target, registry, sanitize_op_kind):
            reasons.append(f"node {node.name} calls {node.target}, which has no Core ML form")
        if node.target == ops.kv_attention.overload and (batch := node.args[3].meta["val"].shape[0]) != 1:
            reasons.append(f"node {node.name}: the cache is written for one row, not {batch}")
    return reasons


def _searches(program: Program) -> int:
    """How many times the nearest entry of a codebook is looked for."""
    aten = torch.ops.aten
    found = (aten.argmin.default, aten.argmax.default, aten.max.dim, aten.min.dim)
    return sum(node.target in found for node in program.exported.graph.nodes)


def _known(target: Any, registry: Any, spelled: Callable[[str], str]) -> bool:
    """Whether an operator is fused, has a lowering, is in the vendor's table, or is re-expressed by PyTorch itself."""
    target = column.RESPELLED.get(target, target)
    kind = target.name() if hasattr(target, "name") else target.__name__
    if kind.startswith(f"{ops.NAMESPACE}::") or kind in column.LOWERINGS:
        return True
    return registry.get_func(spelled(kind)) is not None or getattr(target, "_can_decompose", bool)()


def _check_scales(program: Program) -> None:
    """Refuses scales that float16 does not hold exactly: they are the student's own."""
    for prefix in program.inherited:
        scales = program.constants[f"{prefix}.scales"].load()
        wrong = int((scales.astype(np.float16).astype(np.float32) != scales).sum())
        if wrong:
            raise ExportError(
                f"{wrong} of {scales.size} scales are not float16 numbers, which the compressed constants of a float16 "
                "program are made of",
                where=f"{prefix} for Core ML",
                way_out="Use coreml/mlprogram/exact, or quantise the student with float16 scales.",
            )


# --- writing ------------------------------------------------------------------------------------------------------


def _write(job: Job, form: str, mode: str) -> Artifact:
    program, profile = job.program, job.profile
    recipe = Recipe(
        half=mode == "fp16",
        channels=profile.coreml_compute_units == "CPU_AND_NE" and mode == "fp16",
        target=profile.coreml_target or TARGETS[0],
        palettised=form == "palettised",
    )
    path = job.out / CoreMlExporter.name / f"{program.entry}.{form}.{mode}.mlpackage"
    functions = _functions(job, recipe)
    with tempfile.TemporaryDirectory(prefix="coreml-") as scratch:
        parts = {name: Path(scratch) / f"{name}.mlpackage" for name, _ in functions.values()}
        for name, sizes in functions.values():
            convert(program, recipe, sizes, parts[name])
            job.progress(0)
        package.join(parts, path)
    package.describe(path, _texts(program), _metadata(job, form, mode, recipe))
    written = package.files(path)
    job.progress(sum(file.stat().st_size for file in written))
    relative = tuple(file.relative_to(job.out).as_posix() for file in written)
    options = {
        "functions": {key: name for key, (name, _) in functions.items()},
        "compute_units": profile.coreml_compute_units or "ALL",
        "layout": "channels" if recipe.channels and program.states else "rows",
        "stateful": recipe.half and bool(program.states),
    }
    operators = package.histogram(package.read(path))
    precision = _precision(program, recipe)
    return new_artifact(program, CoreMlExporter.name, (form, mode), relative, precision, operators, options=options)


def _write_guides(out: Path) -> tuple[str, ...]:
    """The page and the sample for whoever writes the app, in docs/coreml; their paths in the bundle."""
    folder = out / "docs" / CoreMlExporter.name
    folder.mkdir(parents=True, exist_ok=True)
    guides = sorted(path for path in GUIDES.iterdir() if path.suffix in (".md", ".swift"))
    for guide in guides:
        shutil.copyfile(guide, folder / guide.name)
    return tuple((folder / guide.name).relative_to(out).as_posix() for guide in guides)


def _functions(job: Job, recipe: Recipe) -> dict[str, tuple[str, Mapping[str, int] | None]]:
    """Key in the artifact's options -> (function's name, its sizes); the first is the default."""
    program = job.program
    if program.states:
        capacity = program.states[0].shape[2]
        sizes = [size for size in BUCKETS if size <= capacity]
        return {str(n): ("decode" if n == 1 else f"prefill_{n}", {"S": n}) for n in sizes}
    functions: dict[str, tuple[str, Mapping[str, int] | None]] = {"any": ("main", None)}
    feeds = next(iter(job.samples()), None)
    if recipe.half and feeds is not None:
        [spec] = program.inputs
        shape = feeds[spec.name].shape
        fixed = {name: size for name, size in zip(spec.shape, shape, strict=True) if isinstance(name, str)}
        functions["x".join(map(str, shape))] = ("one", fixed)
    return functions


def _precision(program: Program, recipe: Recipe) -> dict[str, str]:
    weights = stored_precision(program)
    if weights == "float32" and recipe.half:
        weights = f"palettised, a re-quantisation to {recipe.bits} bits" if recipe.palettised else "float16"
    return {"weights": weights, "activations": "float16" if recipe.half else "float32"}


def _texts(program: Program) -> dict[str, str]:
    """What each input, output and state is, for Xcode and for whoever opens the package."""
    texts = {
        spec.name: f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in program.inputs + program.outputs
    }
    if program.states:
        texts |= {
            "ids": "Token ids, as many as the function's name says.",
            "last": "Position of the newest of the tokens, counted from 0.",
            "logits": "Scores of the token that follows the newest one.",
        }
        for state in program.states:
            text = f"KV cache of the layer; slot i holds position i, {list(state_shape(state.shape))} as a state."
            texts |= {state.name: text, state.input: text, state.output: text}
    return texts


def _metadata(job: Job, form: str, mode: str, recipe: Recipe) -> dict[str, str]:
    """What an app reads: who made the model, and the constants that go with it, as JSON texts."""
    program = job.program
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.about.items()}
    return {
        "short_description": f"{program.entry} ({form}, {mode})",
        "edge.component": program.entry,
        "edge.precision": json.dumps(_precision(program, recipe)),
        "edge.inputs": json.dumps({spec.name: list(spec.shape) for spec in program.inputs}),
        **about,
    }


def _producer(node: Any) -> tuple[Any, str]:
    """The node that computes what ``node`` stands for, and the name of that result in the package."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        parent, index = node.args
        return parent, parent.name if index == 0 else f"{parent.name}__{index}"
    return node, node.name


def _shape(producer: Any, node: Any) -> tuple[int | str, ...]:
    """Sizes of the node's (first) result; flexible ones by the symbol's name."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(size if isinstance(size, int) else str(size) for size in first.shape)
