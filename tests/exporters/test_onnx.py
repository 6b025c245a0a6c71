"""The ONNX files of the tiny student's language model: which operators, which bytes, and the same every time."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from exporters.external_data import ALIGNMENT, THRESHOLD, WeightFile
from exporters.onnx_ import FORMS, OnnxExporter
from exporters.passes.mark_origins import MODULE, NODE
from tests.exporters.conftest import CAPACITY, ExportedLm, ExportLm, export_lm

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, VOCAB = 2, 4, 2, 16, 64, 136
#: What the fused operators replace: none of it may be left.
LEFTOVERS = {
    "Softmax", "Pow", "ReduceMean", "Sqrt", "Sin", "Cos", "RotaryEmbedding", "Sigmoid", "Neg", "Transpose", "Where",
    "DequantizeLinear", "MatMul", "ScatterElements", "TensorScatter", "Attention", "LayerNormalization",
}  # fmt: skip

#: All else in the exact form. The embedding: codes and scales gathered, codes centred and scaled. The ends: `last` + 1
#: as a scalar for attention, the newest position alone for the head (sliced by transformers, squeezed by the wrapper),
#: which split_bytes hands it twice.
ENDS = Counter(
    {"Gather": 3, "Cast": 1, "Sub": 1, "Unsqueeze": 1, "Mul": 1, "Reshape": 1, "Add": 1, "Squeeze": 1, "Slice": 1}
    | {"Concat": 1}
)


@pytest.fixture(scope="module")
def int4(exported_lm: ExportLm) -> ExportedLm:
    return exported_lm("int4")


def operators(exported: ExportedLm, form: str, mode: str) -> Counter[str]:
    """Counted in the file itself."""
    model = onnx.load(exported.folder / exported.artifacts[form, mode].model, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_fused_graph_is_the_fused_operators(int4: ExportedLm, mode: str) -> None:
    counts = operators(int4, "fused", mode)
    # With int8 activations gate and up projection are a product each, and nothing is split.
    assert counts["MatMulNBits"] == {"exact": 4, "fast": 5}[mode] * LAYERS + 1
    assert counts["Split"] == {"exact": LAYERS, "fast": 0}[mode]
    assert counts["GroupQueryAttention"] == LAYERS
    # Two norms per layer and the last one: the first has no sum in front of it.
    assert counts["RMSNormalization"] == 1
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert counts["QuickGelu"] == LAYERS
    assert not LEFTOVERS & set(counts)
    assert int4.artifacts["fused", mode].operators == dict(sorted(counts.items()))


def test_the_rest_of_the_fused_graph_is_the_embedding_and_the_ends(int4: ExportedLm) -> None:
    counts = operators(int4, "fused", "exact")
    for fused in ("MatMulNBits", "GroupQueryAttention", "RMSNormalization", "SkipSimplifiedLayerNormalization"):
        del counts[fused]
    assert counts == ENDS + Counter({"Split": LAYERS, "QuickGelu": LAYERS, "Mul": LAYERS})


def test_the_standard_graph_has_standard_operators_alone(int4: ExportedLm) -> None:
    model = onnx.load(int4.folder / int4.artifacts["standard", "exact"].model, load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [
        ("", FORMS["standard", "exact"].opset)
    ]
    counts = operators(int4, "standard", "exact")
    assert counts["DequantizeLinear"] == counts["MatMul"] == 4 * LAYERS + 1
    assert counts["Transpose"] == 4 * LAYERS  # of attention: none of a matrix
    assert counts["Attention"] == LAYERS and counts["TensorScatter"] == counts["RotaryEmbedding"] == 2 * LAYERS
    assert counts["RMSNormalization"] == 2 * LAYERS + 1
    assert not {"Softmax", "Pow", "ReduceMean", "Sin", "Cos"} & set(counts)


def test_onnx_runtime_multiplies_with_the_codes_of_the_standard_graph(int4: ExportedLm, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = int4.folder / int4.artifacts["standard", "exact"].model
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph)
    assert counts["MatMulNBits"] == 4 * LAYERS + 1
    assert not {"DequantizeLinear", "MatMul"} & set(counts)


@pytest.mark.parametrize("form", ["fused", "standard"])
def test_the_model_is_valid_and_its_signature_is_the_artifacts(int4: ExportedLm, form: str) -> None:
    artifact = int4.artifacts[form, "exact"]
    path = int4.folder / artifact.model
    if form == "standard":  # the checker knows no contrib operators
        onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)

    def signature(values) -> dict[str, tuple[int, list[int | str]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    cache = {"key": (onnx.TensorProto.FLOAT, [1, KV_HEADS, CAPACITY, WIDTH])}
    inputs, outputs = signature(model.graph.input), signature(model.graph.output)
    assert inputs["ids"][0] == inputs["last"][0] == onnx.TensorProto.INT32
    assert inputs["ids"][1][0] == 1 and isinstance(inputs["ids"][1][1], str) and inputs["last"][1] == [1]
    assert outputs["logits"] == (onnx.TensorProto.FLOAT, [1, VOCAB])
    assert list(inputs) == [spec.name for spec in artifact.inputs] + [state.input for state in artifact.states]
    assert list(outputs) == [spec.name for spec in artifact.outputs] + [state.output for state in artifact.states]
    for state in artifact.states:
        assert inputs[state.input] == outputs[state.output] == cache["key"]
        assert list(state.shape) == cache["key"][1]


def references(exported: ExportedLm) -> dict[str, dict[str, tuple[str, int, int]]]:
    """model file -> initializer -> (data file, offset, length)."""
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for artifact in exported.artifacts.values():
        model = onnx.load(exported.folder / artifact.model, load_external_data=False)
        rows = found[artifact.model] = {}
        for tensor in model.graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                rows[tensor.name] = f"onnx/{entry['location']}", int(entry["offset"]), int(entry["length"])
        assert {file for file, _, _ in rows.values()} == {*artifact.files} - {artifact.model}
    return found


@pytest.mark.parametrize("variant", ["int4", "float"])
def test_the_data_files_are_what_is_referenced_and_padding(exported_lm: ExportLm, variant: str) -> None:
    exported = exported_lm(variant)
    found = {span for rows in references(exported).values() for span in rows.values()}
    spans = sorted(found, key=lambda span: (*span[:2], -span[2]))
    names = {path.relative_to(exported.folder).as_posix() for path in (exported.folder / "onnx").glob("*.data")}
    assert names == {name for name, _, _ in spans}
    for name in names:
        data, end = (exported.folder / name).read_bytes(), 0
        for offset, length in (span[1:] for span in spans if span[0] == name):
            assert offset % ALIGNMENT == 0 and length >= THRESHOLD
            if offset + length > end:  # no part of a matrix that another form has as a whole
                assert 0 <= offset - end < ALIGNMENT and not any(data[end:offset])
                end = offset + length
        assert end == len(data)


def test_equal_tensors_are_stored_once_for_all_forms(int4: ExportedLm) -> None:
    used = references(int4)
    fused, fast, standard = (used[int4.artifacts[key].model] for key in FORMS)
    quantised = [name for name in fast if re.search(r"layers.*\.codes$", name)]
    assert len(quantised) == 3 * LAYERS
    for name in (*quantised, "model.norm.weight", "model.rotary_emb.cos"):
        assert fused[name] == fast[name]
        assert fused[name][0] == "onnx/lm.data"
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.gate_up_proj.matrix.codes"
        file, offset, length = fused[name]
        assert [fast[f"{name}.part{i}"] for i in (0, 1)] == [
            (file, offset + i * length // 2, length // 2) for i in (0, 1)
        ]
    for name in ("model.norm.weight", "model.rotary_emb.cos", "model.embed_tokens.matrix.codes"):
        assert standard[name] == fast[name]


def test_an_artifact_names_the_files_that_it_reads(int4: ExportedLm) -> None:
    def data(form: str, mode: str) -> list[str]:
        artifact = int4.artifacts[form, mode]
        return [file for file in artifact.files if file != artifact.model]

    # The exact form has the head's 8 bits in two planes of nibbles; the standard one has all codes transposed.
    assert data("fused", "exact") == ["onnx/lm.data"]
    assert data("fused", "fast") == ["onnx/lm.data"]  # whose embedding looks the head's codes up as they are
    assert data("standard", "exact") == ["onnx/lm.data", "onnx/lm.standard.exact.data"]


def test_weights_are_not_in_the_model_files(int4: ExportedLm) -> None:
    for artifact in int4.artifacts.values():
        model = onnx.load(int4.folder / artifact.model, load_external_data=False)
        assert all(len(tensor.raw_data) < THRESHOLD for tensor in model.graph.initializer)
        for node in model.graph.node:
            assert all(len(attribute.t.raw_data) < THRESHOLD for attribute in node.attribute)


def test_two_exports_are_byte_identical(int4: ExportedLm, tmp_path: Path) -> None:
    again = export_lm(int4.student, tmp_path)
    names = sorted(path.name for path in (int4.folder / "onnx").iterdir())
    assert names == sorted(path.name for path in (again.folder / "onnx").iterdir())
    for name in names:
        assert (again.folder / "onnx" / name).read_bytes() == (int4.folder / "onnx" / name).read_bytes(), name


def test_nodes_name_the_program_and_the_checkpoint(int4: ExportedLm) -> None:
    names = {node.name for node in int4.program.exported.graph.nodes}
    model = ir.load(int4.folder / int4.artifacts["fused", "exact"].model)
    for node in model.graph:
        assert set(node.metadata_props) <= {NODE, MODULE}
        assert node.metadata_props.get(NODE, next(iter(names))) in names
    modules = [n.metadata_props.get(MODULE) for n in model.graph if n.op_type == "MatMulNBits"]
    layer = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert [m for m in modules if m and ".layers." in m] == [
        f"model.layers.{i}.{name}" for i in range(LAYERS) for name in layer
    ]
    attention = [n.metadata_props[MODULE] for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert attention == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]


def test_a_float_student_has_plain_products(exported_lm: ExportLm) -> None:
    exported = exported_lm("float")
    assert set(exported.artifacts) == {("fused", "exact"), ("standard", "exact")}
    for form in ("fused", "standard"):
        counts = operators(exported, form, "exact")
        assert counts["MatMul"] + counts["Gemm"] + counts["FusedMatMul"] == 4 * LAYERS + 1
        assert not {"MatMulNBits", "DequantizeLinear"} & set(counts)
        assert form == "standard" or counts["Transpose"] == 1  # of the columns that are looked up as embeddings
        artifact = exported.artifacts[form, "exact"]
        assert artifact.precision == {"weights": "float32", "activations": "float32"}


def test_what_an_artifact_says_of_itself(int4: ExportedLm) -> None:
    exact, fast = int4.artifacts["fused", "exact"], int4.artifacts["fused", "fast"]
    assert exact.precision == {"weights": "int4 g32 + int8 g64", "activations": "float32"}
    assert fast.precision["activations"] == "int8 per block"
    assert exact.files == ("onnx/lm.fused.exact.onnx", "onnx/lm.data")
    # Weights as stored, the head's table once; the embedding looks rows up in that same table.
    matrices = sum(tensor.codes.nbytes for tensor in int4.student.quantized.values())
    scales = sum(tensor.scales.nbytes for tensor in int4.student.quantized.values())
    assert matrices + scales < exact.bytes_per_token < 1.1 * (matrices + scales)


def test_fast_differs_from_exact_in_the_accuracy_level_alone(int4: ExportedLm) -> None:
    levels = {}
    for mode in ("exact", "fast"):
        model = ir.load(int4.folder / int4.artifacts["fused", mode].model)
        levels[mode] = {n.attributes["accuracy_level"].as_int() for n in model.graph if n.op_type == "MatMulNBits"}
    assert levels == {"exact": {1}, "fast": {4}}


def test_an_opset_newer_than_the_profiles_is_a_reason(int4: ExportedLm) -> None:
    from dataclasses import replace

    from device_profiles import load_profile

    profile = replace(load_profile("host"), onnx_opset=23)
    exporter = OnnxExporter()
    assert exporter.unsupported(int4.program, profile, ("fused", "exact")) == []
    [reason] = exporter.unsupported(int4.program, profile, ("standard", "exact"))
    assert reason == "lm: standard/exact needs opset 24, the profile has 23"


def test_the_weight_file_writes_equal_content_once(tmp_path: Path) -> None:
    sizes = []
    values = np.arange(100, dtype=np.float32)
    with WeightFile(tmp_path / "w.data", sizes.append) as weights:
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
        for name, value in (("a", values), ("b", values.copy()), ("c", values + 1), ("small", values[:4])):
            model.graph.register_initializer(ir.Value(name=name, const_value=ir.Tensor(value, name=name)))
        weights.adopt(model)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert sizes == [400, 400]
    assert (held["a"].offset, held["b"].offset, held["c"].offset) == (0, 0, 448)
    assert not isinstance(held["small"], ir.ExternalTensor)
    assert (tmp_path / "w.data").stat().st_size == 848
    with pytest.raises(FileExistsError), WeightFile(tmp_path / "w.data"):
        pass
