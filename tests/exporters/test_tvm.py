"""TVM artifacts of the tiny student: which kernels, which bytes, what comes back out of the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from device_profiles import load_profile
from device_profiles.schema import Profile
from exporters import inheritance
from exporters.backends import Job
from exporters.errors import ExportError
from exporters.families import capture_student
from exporters.program import Program, capture
from exporters.student import Student, load_student
from exporters.tvm_ import LENGTHS, TvmExporter
from exporters.tvm_kernels import CompilerError, run_compiler
from exporters.tvm_targets import VARIANTS, cpu_target
from runtimes.bundle import Artifact, TensorSpec
from runtimes.session import BackendUnavailable, Limits
from runtimes.tvm_ import Loaded, TvmSession
from runtimes.tvm_files import check_machine, extensions
from tests.conftest import MakeStudent

CAPACITY, LAYERS = 128, 2
EXACT, FAST = ("compiled", "exact"), ("compiled", "fast")


@dataclass(frozen=True)
class Exported:
    """Every program of a student and its artifacts, in ``folder``; read only."""

    student: Student
    programs: Mapping[str, Program]
    artifacts: Mapping[tuple[str, str], Artifact]
    folder: Path

    def session(self, component: str, mode: str = "exact") -> TvmSession:
        artifact = self.artifacts[component, mode]
        loaded = Loaded(artifact, self.folder / artifact.model, self.folder / artifact.options["parameters"])
        return TvmSession(loaded, artifact, Limits(CAPACITY if component == "lm" else 0))


@pytest.fixture(scope="module")
def exported(make_tiny_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    student, folder = load_student(make_tiny_student()), tmp_path_factory.mktemp("tvm")
    exporter, profile, artifacts = TvmExporter(), load_profile("host"), {}
    programs = {program.entry: program for program in capture_student(student, CAPACITY)}
    for program in programs.values():
        for artifact in exporter.export(Job(program, profile, folder, exporter.forms(program))):
            artifacts[program.entry, artifact.mode] = artifact
    return Exported(student, programs, artifacts, folder)


def test_the_language_model_is_one_kernel_a_fused_op(exported: Exported) -> None:
    operators = exported.artifacts["lm", "exact"].operators
    kernels = {name: count for name, count in operators.items() if name.startswith("edge_")}
    assert kernels == {
        "edge_add_rms_norm": 2 * LAYERS,
        "edge_kv_attention_packed": LAYERS,
        "edge_quantized_embedding": 1,
        "edge_quantized_linear": 4 * LAYERS + 1,
        "edge_rms_norm": 1,
        "edge_swiglu": LAYERS,
    }
    # The head reads the newest row alone: a slice and a squeeze or take. Nothing else is left to TVM.
    assert set(operators) - set(kernels) <= {"relax.null_value", "relax.strided_slice", "relax.squeeze", "relax.take"}


def test_convolutions_take_norms_sums_and_activations_along(exported: Exported) -> None:
    """The audio decoder is nothing but convolutions then; the tiny image decoder has an attention block besides."""
    audio = exported.artifacts["audio_decoder", "exact"].operators
    assert set(audio) == {"edge_codebook_lookup", "edge_conv", "edge_conv_transpose", "relax.null_value"}
    image = exported.artifacts["image_decoder", "exact"].operators
    assert image["edge_group_norm_factors"] > 10 and image["edge_group_norm"] == 1
    assert not {"edge_activate", "relax.nn.silu", "relax.nn.conv2d"} & set(image)


def test_the_nearest_code_is_one_kernel(exported: Exported) -> None:
    operators = exported.artifacts["image_encoder", "exact"].operators
    assert operators["edge_nearest_code"] == 1
    assert not {"relax.argmin", "relax.sqrt"} & set(operators)


class Nearest(torch.nn.Module):
    """The nearest codes of rows and, where asked for, the distances too."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told
        self.codes = torch.nn.Parameter(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        distances = torch.cdist(x, self.codes)
        nearest = distances.argmin(1).to(torch.int32)
        return (nearest, distances) if self.told else (nearest,)


@pytest.mark.parametrize("told", [False, True])
def test_distances_that_something_else_reads_are_computed(told: bool, tmp_path: Path) -> None:
    module, x = Nearest(told).eval(), torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    outputs = (TensorSpec("nearest", "int32", (9,)), TensorSpec("distances", "float32", (9, 40)))[: 2 if told else 1]
    program = capture("image_encoder", module, (x,), {}, outputs, ("x",))
    [artifact] = TvmExporter().export(Job(program, load_profile("host"), tmp_path, (EXACT,)))
    assert artifact.operators.get("edge_nearest_code", 0) == (not told)
    loaded = Loaded(artifact, tmp_path / artifact.model, tmp_path / artifact.options["parameters"])
    for actual, expected in zip(loaded.call("run", {"x": x.numpy()}), module(x), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_lengths_stop_at_the_context(exported: Exported) -> None:
    functions = exported.artifacts["lm", "exact"].options["functions"]
    assert [int(length) for length in functions] == [length for length in LENGTHS if length <= CAPACITY]


def test_integer_weights_stay_integer(exported: Exported) -> None:
    """TVM would fold a constant's dequantisation into the library as float32."""
    artifact = exported.artifacts["lm", "exact"]
    weights = load_file(exported.folder / artifact.options["parameters"])
    program = exported.programs["lm"]
    for prefix, matrix in program.inherited.items():
        codes = weights[f"{prefix}.codes:panels"]
        rows = -(-sum(matrix.rows) // 16) * 16
        columns = -(-matrix.columns // matrix.block) * matrix.block
        assert codes.dtype == np.uint32 and codes.nbytes == rows * columns * matrix.bits // 8
    held = sum(constant.nbytes for constant in program.constants.values())
    assert sum(values.nbytes for values in weights.values()) < 1.5 * held  # zero points are whole bytes here
    assert (exported.folder / artifact.model).stat().st_size < 2 << 20
    assert artifact.files[1] == exported.artifacts["lm", "fast"].files[1]  # one file for both modes


def test_every_weight_begins_on_a_cache_line(exported: Exported) -> None:
    raw = (exported.folder / exported.artifacts["lm", "exact"].options["parameters"]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    odd = [name for name, entry in header.items() if (8 + length + entry["data_offsets"][0]) % 64]
    assert not [name for name in odd if name.endswith(":panels")]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_codes_scales_and_zero_points_come_back(exported: Exported, mode: str) -> None:
    program, artifact = exported.programs["lm"], exported.artifacts["lm", mode]
    stored = TvmExporter().read_matrices(exported.folder, artifact, program)
    found = inheritance.compare("tvm", program, stored, exported.student.quantized)
    assert found.total == found.identical > 0


def test_a_changed_code_is_seen(exported: Exported, tmp_path: Path) -> None:
    program, artifact = exported.programs["lm"], exported.artifacts["lm", "exact"]
    shutil.copytree(exported.folder / "tvm", tmp_path / "tvm")
    path = tmp_path / artifact.options["parameters"]
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("qkv_proj.matrix.codes:panels"))
    weights[name][0, 0, 0] ^= 1
    save_file(weights, path)
    stored = TvmExporter().read_matrices(tmp_path, artifact, program)
    found = inheritance.compare("tvm", program, stored, exported.student.quantized)
    assert len(found.mismatches) == 1 and "qkv_proj" in found.mismatches[0] and "codes" in found.mismatches[0]


def test_two_exports_are_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    program = exported.programs["lm"]
    [artifact] = TvmExporter().export(Job(program, load_profile("host"), tmp_path, [EXACT]))
    for file in artifact.files:
        assert (tmp_path / file).read_bytes() == (exported.folder / file).read_bytes(), file


def test_observed_values_are_those_of_the_artifacts_own_files(exported: Exported, tmp_path: Path) -> None:
    """Kernels are told their node's name; a scale that is wrong in the file shows at the first node that reads it."""
    program, artifact = exported.programs["lm"], exported.artifacts["lm", "exact"]
    nodes = [node.name for node in program.exported.graph.nodes if node.op == "call_function"]
    exporter = TvmExporter()
    ids = np.array([[3]], np.int32)
    seen = []
    for factor in (1, 2):
        out = tmp_path / str(factor)
        observed, names = exporter.observe(exported.folder, artifact, program, nodes, out)
        path = out / observed.options["parameters"]
        weights = load_file(path)
        weights["model.layers.1.mlp.down_proj.matrix.scales:panels"] *= factor
        save_file(weights, path)
        loaded = Loaded(observed, out / observed.model, path)
        with TvmSession(loaded, observed, Limits(CAPACITY)) as session:
            outputs = {name: np.array(value) for name, value in session.run({"ids": ids}).items()}
        seen.append({node: outputs[name] for node, name in names.items()})
    assert {"quantized_embedding", "rms_norm", "kv_attention", "add_rms_norm_default"} <= set(seen[0])
    changed = [node for node in seen[0] if not np.array_equal(seen[0][node], seen[1][node])]
    [first] = [n for n in program.exported.graph.nodes if n.name == next(n for n in nodes if n in changed)]
    assert "layers_1_mlp_down_proj" in str(first.args[1])
    np.testing.assert_allclose(seen[1][first.name], 2 * seen[0][first.name], rtol=1e-6)


def test_the_fast_mode_is_near_but_another(exported: Exported) -> None:
    ids = np.arange(20, dtype=np.int32)[None] % 100
    with exported.session("lm") as exact, exported.session("lm", "fast") as fast:
        a, b = (np.array(session.run({"ids": ids})["logits"]) for session in (exact, fast))
    assert 0 < np.abs(a - b).max() < 0.2 * np.abs(a).max()


# --- targets --------------------------------------------------------------------------------------------------------


def profile(**changes: object) -> Profile:
    return replace(load_profile("raspberry-pi-5"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("raspberry-pi-5", "dotprod"), ("intel-n100", "avxvnni"), ("intel-lunar-lake", "avxvnni")],
)
def test_the_profiles_isa_chooses_the_variant(name: str, variant: str) -> None:
    target = cpu_target(load_profile(name))
    assert target.variant.name == variant
    assert set(target.variant.isa) <= set(load_profile(name).isa or ())


def test_the_host_gets_the_first_variant_that_it_runs() -> None:
    target = cpu_target(load_profile("host"))
    assert target.variant == next(v for v in VARIANTS[target.arch] if extensions().issuperset(v.isa))


def test_a_processor_without_the_least_extensions_is_refused() -> None:
    with pytest.raises(ExportError, match="need avx2, fma, f16c"):
        cpu_target(replace(load_profile("intel-n100"), isa=("sse4_2",)))


def test_a_system_without_a_compiler_is_refused() -> None:
    with pytest.raises(ExportError, match=r"no C\+\+ compiler for aarch64 ios"):
        cpu_target(profile(os="ios"))


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(CompilerError, match=r"g\+\+-of-nowhere: is not installed.*tools/setup_system"):
        run_compiler("g++-of-nowhere", [])


def test_a_profile_without_a_target_is_refused(exported: Exported) -> None:
    reasons = TvmExporter().unsupported(exported.programs["lm"], profile(tvm_target=None), EXACT)
    assert reasons == ["profile raspberry-pi-5 has no tvm_target"]


# --- GPUs: generated, not run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "target"), [("jetson-orin", None), ("android-snapdragon-8-elite", "opencl"),
                                              ("browser-wasm", "webgpu")])  # fmt: skip
def test_code_for_a_gpu_holds_its_kernels(exported: Exported, tmp_path: Path, name: str, target: str | None) -> None:
    device = load_profile(name)
    if target is not None:
        device = replace(device, tvm_target=json.dumps({"kind": target}))
    program, exporter = exported.programs["audio_decoder"], TvmExporter()
    assert exporter.unsupported(program, device, EXACT) == []
    [artifact] = exporter.export(Job(program, device, tmp_path, [EXACT]))
    assert any("conv1d_transpose" in kernel for kernel in artifact.operators), artifact.operators
    assert artifact.options["device"] == (target or "cuda")
    with pytest.raises(BackendUnavailable, match="is code for"):
        check_machine(artifact)


def test_what_a_gpu_cannot_take_is_refused_by_node(exported: Exported) -> None:
    exporter, browser = TvmExporter(), load_profile("browser-wasm")
    [reason] = exporter.unsupported(exported.programs["lm"], browser, EXACT)
    assert "64-bit integers" in reason
    [reason] = exporter.unsupported(exported.programs["image_encoder"], load_profile("jetson-orin"), EXACT)
    assert "node argmin" in reason
    reasons = exporter.unsupported(exported.programs["lm"], load_profile("jetson-orin"), FAST)
    assert reasons == ["lm: only the CPU kernels have a fast mode"]
