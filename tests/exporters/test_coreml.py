"""Core ML packages of the tiny student: functions, states, weights, layouts, names, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles import load_profile
from exporters import coreml_package as package
from exporters.backends import Job
from exporters.coreml_ import BUCKETS, CoreMlExporter
from exporters.errors import ExportError
from exporters.families.decoder_lm import capture_lm
from exporters.inheritance import compare
from exporters.program import Program, capture
from exporters.student import load_student
from runtimes.bundle import TensorSpec
from runtimes.metrics import HIGHER_IS_BETTER
from runtimes.parity import check_artifact
from runtimes.session import open_session
from tests.conftest import MakeStudent
from tests.coreml_maker import CAPACITY, PROFILE, Exported, export, exported

LAYERS, KV_HEADS, WIDTH = 2, 2, 16
FUNCTIONS = ("decode", "prefill_4", "prefill_16")  # the cache is too short for 64


@pytest.fixture(scope="module")
def int4(make_tiny_student: MakeStudent) -> Exported:
    return exported(make_tiny_student())


def operators(int4: Exported, mode: str, function: str) -> Counter[str]:
    return Counter(op.type for op in package.operations(package.read(int4.package("lm", mode)), function))


@pytest.mark.parametrize("mode", ["fp16", "exact"])
def test_a_function_for_each_length_and_decode_is_the_default(int4: Exported, mode: str) -> None:
    spec = package.read(int4.package("lm", mode))
    assert spec.specificationVersion == 9
    assert tuple(function.name for function in spec.description.functions) == FUNCTIONS
    assert spec.description.defaultFunctionName == "decode"
    for function, size in zip(spec.description.functions, BUCKETS, strict=False):
        shapes = {feature.name: list(feature.type.multiArrayType.shape) for feature in function.input}
        assert shapes["ids"] == [1, size] and shapes["last"] == [1]


def test_the_cache_is_a_state_whose_dimensions_the_neural_engine_takes(int4: Exported) -> None:
    for function in package.read(int4.package("lm", "fp16")).description.functions:
        assert [state.name for state in function.state] == [
            f"{kind}_{i}" for i in range(LAYERS) for kind in ("key", "value")
        ]
        for state in function.state:
            held = state.type.stateType.arrayType
            assert list(held.shape) == [1, KV_HEADS, 64, 32]  # 40 rows of 16
            assert held.dataType == held.FLOAT16
    counts = operators(int4, "fp16", "decode")
    assert counts["slice_update"] == counts["write_state"] == 2 * LAYERS
    assert not {"scatter", "scatter_along_axis"} & set(counts)


def test_the_exact_mode_takes_and_gives_the_cache_in_float32(int4: Exported) -> None:
    [decode, *_] = package.read(int4.package("lm", "exact")).description.functions
    assert not decode.state
    assert [f.name for f in decode.output] == ["logits", *(s.output for s in int4.programs["lm"].states)]
    kinds = {op.type for op in package.operations(package.read(int4.package("lm", "exact")))}
    assert "read_state" not in kinds
    dtypes = {
        output.type.tensorType.dataType
        for op in package.operations(package.read(int4.package("lm", "exact")))
        for output in op.outputs
    }
    assert 10 not in dtypes  # FLOAT16 of MIL.proto


@pytest.mark.parametrize("mode", ["fp16", "exact"])
def test_functions_share_their_weights(int4: Exported, mode: str) -> None:
    path = int4.package("lm", mode)
    offsets: dict[tuple[str, str], set[int]] = {}
    for op in package.operations(package.read(path)):
        for key, argument in op.inputs.items() if op.type.startswith("constexpr_") else ():
            for binding in argument.arguments:
                place = offsets.setdefault((op.outputs[0].name, key), set())
                place.add(binding.value.blobFileValue.offset)
    assert len([name for name, key in offsets if key == "data"]) == 4 * LAYERS + 1
    assert all(len(places) == 1 for places in offsets.values())
    # Every code once, as many bits as the student gave it, and little else: norms and tables of angles.
    matrices = sum(tensor.codes.nbytes + tensor.scales.nbytes for tensor in int4.student.quantized.values())
    assert (path / "Data" / package.WEIGHTS / "weight.bin").stat().st_size < 1.5 * matrices


@pytest.mark.parametrize("mode", ["fp16", "exact"])
def test_the_students_own_numbers_stand_in_every_function(int4: Exported, mode: str) -> None:
    program, artifact = int4.programs["lm"], int4.artifacts["lm", mode]
    stored = CoreMlExporter().read_matrices(int4.folder, artifact, program)
    result = compare("coreml", program, stored, int4.student.quantized)
    assert result.identical == result.total == 3 * len(int4.student.quantized)


def test_one_changed_code_is_found(int4: Exported, tmp_path: Path) -> None:
    source, program = int4.package("lm", "fp16"), int4.programs["lm"]
    copy = tmp_path / source.relative_to(int4.folder)
    package.copy(source, copy)
    weights = copy / "Data" / package.WEIGHTS / "weight.bin"
    data = bytearray(weights.read_bytes())
    [prefix, *_] = (name for name in program.inherited if "down_proj" in name)
    packed = int4.student.quantized[program.inherited[prefix].sources[0]].codes.tobytes()
    at = bytes(data).find(packed)
    if at < 0:  # symmetric codes are stored less 8, which flips the highest bit of each
        at = bytes(data).find((np.frombuffer(packed, np.uint8) ^ 0x88).tobytes())
    assert at > 0
    data[at] ^= 1
    weights.write_bytes(data)
    stored = CoreMlExporter().read_matrices(tmp_path, int4.artifacts["lm", "fp16"], program)
    result = compare("coreml", program, stored, int4.student.quantized)
    assert result.total - result.identical == 1 and "down_proj" in result.mismatches[0]


def test_the_neural_engines_layout_is_convolutions_and_no_transposes_between_them(int4: Exported) -> None:
    artifact = int4.artifacts["lm", "fp16"]
    assert artifact.options["layout"] == "channels" and artifact.options["compute_units"] == "CPU_AND_NE"
    counts = operators(int4, "fp16", "prefill_4")
    assert counts["conv"] == 4 * LAYERS
    assert counts["linear"] == 1  # the head multiplies with the embedding's own table
    assert counts["constexpr_blockwise_shift_scale"] == 4 * LAYERS + 1
    assert counts["scaled_dot_product_attention"] == KV_HEADS * LAYERS  # one key head at a time
    # Two in each attention, and the way in and out.
    assert counts["transpose"] <= 2 * LAYERS + 2


def test_rows_are_matrix_products(int4: Exported) -> None:
    counts = operators(int4, "exact", "prefill_4")
    assert counts["linear"] == 4 * LAYERS + 1 and not counts["conv"]
    assert counts["scaled_dot_product_attention"] == LAYERS
    assert int4.artifacts["lm", "exact"].operators == dict(
        sorted((name, n) for name, n in operators(int4, "exact", "decode").items() if name != "const")
    )


def test_two_exports_are_byte_identical(int4: Exported, tmp_path: Path) -> None:
    # Together what can differ: states, several functions, fixed and flexible sizes, both precisions.
    for entry, kind in (("lm", ("mlprogram", "fp16")), ("image_decoder", ("mlprogram", "exact"))):
        [artifact] = export(int4.student, int4.programs[entry], tmp_path, [kind])
        for name in artifact.files:
            assert (tmp_path / name).read_bytes() == (int4.folder / name).read_bytes(), name


def test_what_an_app_reads(int4: Exported) -> None:
    spec = package.read(int4.package("lm", "fp16"))
    metadata = spec.description.metadata
    assert metadata.license == int4.student.license and metadata.author and metadata.versionString
    held = {key: value for key, value in metadata.userDefined.items() if key.startswith("edge.")}
    modalities = json.loads(held["edge.modalities"])
    assert modalities["image"]["preprocessing"] == int4.student.modalities["image"].preprocessing
    assert int(held["edge.context"]) == CAPACITY
    assert held["edge.tokenizer"] == "tokenizer/tokenizer.json"
    for function in spec.description.functions:
        assert all(f.shortDescription for f in (*function.input, *function.output, *function.state))
    guides = {"docs/coreml/DecodeGreedy.swift", "docs/coreml/README.md"}
    assert guides <= set(int4.artifacts["lm", "fp16"].files)


def test_a_decoder_takes_any_size_and_has_a_function_of_one_signal(int4: Exported) -> None:
    grid = int4.student.modalities["image"].grid
    assert int4.artifacts["image_decoder", "exact"].options["functions"] == {"any": "main"}
    functions = int4.artifacts["image_decoder", "fp16"].options["functions"]
    assert functions == {"any": "main", "x".join(map(str, (1, *grid))): "one"}
    flexible = package.read(int4.package("image_decoder", "fp16")).description.functions[0]
    sizes = flexible.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert (sizes[0].lowerBound, sizes[0].upperBound) == (1, 64)


def reference_values(program: Program, feeds: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Every node's value, by PyTorch."""
    module = program.exported.module(check_guards=False)
    held = {name: torch.from_numpy(constant.load()) for name, constant in program.constants.items()}
    module.load_state_dict(held, strict=False, assign=True)
    values: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            return values[node.name]

    with torch.no_grad():
        Recorder(module).run(*feeds)
    return values


@pytest.mark.parametrize(("mode", "tolerance"), [("exact", 1e-5), ("fp16", 2e-2)])
def test_observed_values_are_the_programs(int4: Exported, mode: str, tolerance: float, tmp_path: Path) -> None:
    program, artifact = int4.programs["lm"], int4.artifacts["lm", mode]
    nodes = [n.name for n in program.exported.graph.nodes if n.op == "call_function"]
    copy, names = CoreMlExporter().observe(int4.folder, artifact, program, nodes, tmp_path)
    fused = [n for n in nodes if n.startswith(("quantized_linear", "rms_norm", "add_rms_norm", "swiglu", "kv_att"))]
    assert set(fused) <= set(names)
    ids = np.array([[5, 9, 1, 7]], np.int32)
    last, caches = torch.tensor([3], dtype=torch.int32), [torch.zeros(state.shape) for state in program.states]
    expected = reference_values(program, (torch.from_numpy(ids), last, *caches))
    bundle = replace(int4.bundle, folder=tmp_path)
    with open_session(bundle, copy) as session:
        values = session.run({"ids": ids})
    for node, name in names.items():
        wanted = expected[node]
        wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).numpy()
        error = np.abs(values[name] - wanted).max() / np.abs(wanted).max()
        assert values[name].shape == wanted.shape and error < tolerance, (node, error)


def test_a_device_without_core_ml_is_a_reason(int4: Exported) -> None:
    exporter, program = CoreMlExporter(), int4.programs["lm"]
    assert exporter.unsupported(program, PROFILE, ("mlprogram", "fp16")) == []
    [reason] = exporter.unsupported(program, load_profile("intel-n100"), ("mlprogram", "fp16"))
    assert reason == "profile intel-n100 has no Core ML (coreml_target)"
    [reason] = exporter.unsupported(program, replace(PROFILE, coreml_target="iOS17"), ("mlprogram", "fp16"))
    assert "iOS17" in reason and "iOS18" in reason


def test_residual_searches_are_not_for_float16(int4: Exported) -> None:
    exporter, program = CoreMlExporter(), int4.programs["audio_encoder"]
    assert exporter.unsupported(program, PROFILE, ("mlprogram", "exact")) == []
    [reason] = exporter.unsupported(program, PROFILE, ("mlprogram", "fp16"))
    assert "searches" in reason


def test_only_float_weights_are_palettised(int4: Exported) -> None:
    exporter = CoreMlExporter()
    assert ("palettised", "fp16") not in exporter.forms(int4.programs["lm"])
    assert ("palettised", "fp16") in exporter.forms(int4.programs["image_decoder"])


def test_a_palettised_decoder_says_so_and_is_smaller(int4: Exported) -> None:
    artifact, whole = int4.palettised, int4.artifacts["image_decoder", "fp16"]
    assert artifact.precision["weights"] == "palettised, a re-quantisation to 8 bits"
    assert artifact.operators["constexpr_lut_to_dense"] > 0 and "constexpr_lut_to_dense" not in whole.operators
    sizes = [sum((int4.folder / name).stat().st_size for name in a.files) for a in (artifact, whole)]
    assert sizes[0] < sizes[1]  # although the tables of a tiny model's 256 clusters weigh as much as its weights


def test_the_parity_row_of_palettised_weights_is_their_own_measurement(int4: Exported) -> None:
    psnr = {}
    for artifact in (int4.palettised, int4.artifacts["image_decoder", "fp16"]):
        rows = {row.metric: row for row in check_artifact(int4.bundle, artifact)}
        gate = "export-palettised" if artifact is int4.palettised else "export-fp16"
        assert {(row.form, row.mode, row.gate) for row in rows.values()} == {(artifact.form, "fp16", gate)}
        for row in rows.values():
            good = row.value >= row.limit if row.metric in HIGHER_IS_BETTER else row.value <= row.limit
            assert row.status == ("proxy" if good else "failed")
            assert "interpreter of the saved package" in row.where
            assert ("weights palettised, a re-quantisation" in row.where) == (artifact is int4.palettised)
        psnr[artifact.form] = rows["psnr"].value
    # Clusters cost more than rounding to float16 does, and the row has the cost.
    assert 20 < psnr["palettised"] < psnr["mlprogram"] - 3


class Unknown(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j1(x)


def test_an_unknown_operator_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    program = capture(
        "image_decoder",
        Unknown(),
        (torch.zeros(2, 3),),
        {"x": {0: "B"}},
        (TensorSpec("y", "float32", ("B", 3)),),
        ("x",),
    )
    [reason] = CoreMlExporter().unsupported(program, PROFILE, ("mlprogram", "exact"))
    assert "special_bessel_j1" in reason and "node" in reason
    with pytest.raises(ExportError, match=r"special_bessel_j1.*Core ML.*--backends"):
        CoreMlExporter().export(Job(program, PROFILE, tmp_path, [("mlprogram", "exact")]))
    assert not list(tmp_path.iterdir())


def test_scales_that_float16_cannot_hold_are_refused_by_name(make_tiny_student: MakeStudent, tmp_path: Path) -> None:
    student = load_student(make_tiny_student(scale_dtype=torch.float32))
    program = capture_lm(student, CAPACITY)
    with pytest.raises(ExportError, match="scales are not float16 numbers"):
        CoreMlExporter().export(Job(program, PROFILE, tmp_path, [("mlprogram", "fp16")]))
    assert not list(tmp_path.iterdir())
