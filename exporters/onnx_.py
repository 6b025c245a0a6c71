"""The ONNX backend: Program to ``.onnx`` files that share one external weight file per component.

Forms of the language model:
    fused/exact     contrib ops of ONNX Runtime, float32 activations: the inherited arithmetic
    fused/fast      the same graph and weights with int8 activations inside MatMulNBits (its accuracy level 4)
    standard/exact  opset 24 without contrib ops, for every other ONNX runtime
The discretizers have the two exact forms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from exporters import onnx_observation, onnx_weights, ops
from exporters.backends import Job, new_artifact
from exporters.external_data import WeightFile
from exporters.inheritance import StoredMatrix
from exporters.onnx_lowering import translate
from exporters.passes import model_passes
from exporters.passes.context import ModelPass
from exporters.passes.fuse_experts import fuse_experts, fuse_experts_fast, unread
from exporters.passes.spell_integers import INTEGER_PRODUCTS
from exporters.passes.untie_tables import untie_tables
from exporters.program import Program
from exporters.traffic import stored_precision
from runtimes.bundle import Artifact

if TYPE_CHECKING:
    from device_profiles import Profile


@dataclass(frozen=True)
class Form:
    """How one form is made.

    Attributes:
        target: key of the lowerings in ``exporters/ops``.
        opset: version of the standard operator set.
        passes: what the model goes through after lowering, in order.
    """

    target: str
    opset: int
    passes: tuple[ModelPass, ...]


#: (form, mode) -> how it is made. Every list begins with what all models need.
FORMS: Mapping[tuple[str, str], Form] = {
    ("fused", "exact"): Form("onnx/fused", 23, model_passes.FUSED),
    ("fused", "fast"): Form("onnx/fused", 23, model_passes.FUSED_FAST),
    ("standard", "exact"): Form("onnx/standard", 24, model_passes.STANDARD),
}
#: pass -> the first ONNX Runtime whose kernels it was measured with; for an older one a model is made without it.
SINCE: Mapping[ModelPass, tuple[int, int]] = dict.fromkeys((fuse_experts, fuse_experts_fast), (1, 31))


class OnnxExporter:
    """Exporter protocol for ONNX; every form passes through the same lines."""

    name = "onnx"

    def forms(self, program: Program) -> tuple[tuple[str, str], ...]:
        """The (form, mode) pairs that make sense for a program."""
        # Without quantised weights int8 activations have nothing to multiply.
        return tuple(key for key in FORMS if key[1] == "exact" or program.inherited)

    def unsupported(self, program: Program, profile: Profile, form: tuple[str, str]) -> list[str]:
        """Reasons why ``form`` cannot be made for ``profile``, each naming the node or the field; [] if it can."""
        wanted = FORMS[form]
        reasons = []
        if profile.onnx_opset is not None and wanted.opset > profile.onnx_opset:
            reasons.append(
                f"{program.entry}: {'/'.join(form)} needs opset {wanted.opset}, the profile has {profile.onnx_opset}"
            )
        for node in program.exported.graph.nodes:
            namespace = getattr(node.target, "namespace", "aten")
            if node.op == "call_function" and namespace not in ("aten", ops.NAMESPACE, "_operator"):
                reasons.append(f"{program.entry}: node {node.name} calls {node.target}, which has no ONNX form")
        return reasons

    def export(self, job: Job) -> tuple[Artifact, ...]:
        """Writes onnx/<entry>.<form>.<mode>.onnx for each kind, and weight files.

        The first kind's weights are in <entry>.data. What another kind alone needs, such as codes in another order,
        is in a file of its own, so that whoever ships one artifact ships what it reads.
        """
        program, out = job.program, job.out
        folder = out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        written, translated, weights = [], {}, None
        for form, mode in job.kinds:
            recipe = for_profile(FORMS[form, mode], job.profile)
            model = lower(program, recipe, translated)
            path = folder / f"{program.entry}.{form}.{mode}.onnx"
            data = folder / f"{program.entry}.data" if weights is None else path.with_suffix(".data")
            with WeightFile(data, job.progress, weights) as weights:
                weights.adopt(model)
            ir.save(model, path)
            written.append(_artifact(program, form, mode, model, path, out))
        return tuple(written)

    def finish(self, profile: Profile, artifacts: Sequence[Artifact], out: Path) -> None:
        """Nothing is shared."""

    def read_matrices(self, folder: Path, artifact: Artifact, program: Program) -> Mapping[str, StoredMatrix]:
        """See Exporter."""
        return onnx_weights.read_matrices(folder / artifact.model, program.inherited)

    def observe(
        self, folder: Path, artifact: Artifact, program: Program, nodes: Sequence[str], out: Path
    ) -> tuple[Artifact, Mapping[str, str]]:
        """See Exporter."""
        return onnx_observation.observe(folder, artifact, nodes, out)


def for_profile(recipe: Form, profile: Profile) -> Form:
    """The recipe without the passes that write what the device's ONNX Runtime may lack, or what it is to pack."""
    left_out: tuple[ModelPass, ...] = model_passes.MAPPED_TABLES if profile.float_tables == "packed" else ()
    if profile.os == "browser":  # has no mapped files: a second name would be a second copy
        left_out += (untie_tables,)
    recipe = for_runtime(recipe, profile.onnxruntime_version)
    return replace(recipe, passes=tuple(edit for edit in recipe.passes if edit not in left_out))


def for_runtime(recipe: Form, version: str | None) -> Form:
    """The recipe without the passes that write what ONNX Runtime ``version``, None where it is not known, may lack."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    known = (0, 0) if found is None else (int(found[1]), int(found[2]))
    return replace(recipe, passes=tuple(edit for edit in recipe.passes if SINCE.get(edit, (0, 0)) <= known))


def lower(program: Program, recipe: Form, translated: dict[tuple[str, int], Any] | None = None) -> ir.Model:
    """The program as an ONNX model whose large initializers are still to be loaded.

    Args:
        translated: what was traced for other forms of the same program, which those of one target and opset share.
    """
    translated = {} if translated is None else translated
    key = recipe.target, recipe.opset
    if key not in translated:
        table = {op.overload: op.decomposition(recipe.target) for op in ops.REGISTRY.values()}
        translated[key] = translate(program, table | ops.aten_lowerings(recipe.target), recipe.opset)
    source, context = translated[key]
    model = source.clone()
    for edit in recipe.passes:
        edit(model, context)
    return model


def _artifact(program: Program, form: str, mode: str, model: ir.Model, path: Path, out: Path) -> Artifact:
    held = (value.const_value for value in model.graph.initializers.values())
    data = sorted({tensor.location for tensor in held if isinstance(tensor, ir.ExternalTensor)})
    relative = [p.relative_to(out).as_posix() for p in (path, *map(path.with_name, data))]
    operators = Counter(node.op_type for node in model.graph)
    precision = _precision(program, mode, operators)
    made = new_artifact(program, OnnxExporter.name, (form, mode), relative, precision, operators)
    if made.bytes_per_token is None:
        return made
    return replace(made, bytes_per_token=made.bytes_per_token - unread(model))


def _precision(program: Program, mode: str, operators: Collection[str]) -> dict[str, str]:
    activations = "int8 per block" if mode == "fast" else "float32"
    if not INTEGER_PRODUCTS.keys().isdisjoint(operators):
        activations += " + int8 as the student rounds them"
    return {
        "weights": stored_precision(program),
        "activations": activations,
    } | ({"cache": "int8 per channel"} if any(state.dtype == "int8" for state in program.states) else {})
