"""TensorRT artifacts of the tiny student: which form a device gets, what is in the files, the same every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from device_profiles import Profile, load_profile
from exporters.backends import Job
from exporters.blocks import unpack_bits
from exporters.errors import ExportError
from exporters.external_data import WeightFile
from exporters.inheritance import compare
from exporters.ops.tensorrt import BUILD
from exporters.passes.context import Context
from exporters.passes.drop_unused import drop_unused
from exporters.passes.spell_lookups import spell_lookups
from exporters.passes.spell_products import spell_products
from exporters.program import Inherited, Program, capture
from exporters.sensitivity import QuantisationFailed
from exporters.tensorrt_ import TensorRtExporter, lower
from exporters.tensorrt_generations import GENERATIONS, generation_of
from exporters.tensorrt_int8 import plan_int8
from exporters.tensorrt_weights import read_matrices
from runtimes.bundle import TensorSpec
from tests.conftest import MakeStudent
from tests.exporters.test_tensorrt_passes import built, matrix, value
from tests.tensorrt_maker import FUSED, INT8, JETSON, RTX, TYPED, Exported, change, exported, programs, write

LAYERS = 2
EXPORTER = TensorRtExporter()


@pytest.fixture(scope="module")
def typed(tiny_student: Path) -> Exported:
    return exported(tiny_student, "lm", JETSON, TYPED)


@pytest.fixture(scope="module")
def fused(tiny_student: Path) -> Exported:
    return exported(tiny_student, "lm", JETSON, FUSED)


def with_version(version: str | None, **changes: object) -> Profile:
    return replace(load_profile(JETSON), tensorrt_version=version, **changes)  # type: ignore[arg-type]


# --- which form for whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name", "target"),
    [
        ("10.3", "10.3", "decomposed"),
        ("10.3.0.30", "10.3", "decomposed"),
        ("10.8", "10.3", "decomposed"),
        ("10.13.3.9", "10.9", "decomposed"),
        ("10.16", "10.9", "decomposed"),
        ("11.4.1", "11", "native"),
        ("12.0", "11", "native"),
        ("TensorRT-RTX 1.7.1.116", "rtx", "native"),
    ],
)
def test_the_version_chooses_the_generation(version: str, name: str, target: str) -> None:
    generation = generation_of(with_version(version))
    assert (generation.name, generation.target) == (name, target)
    assert generation.plugins == (name != "rtx")


@pytest.mark.parametrize("version", ["10.2", "8.6.1", "9", "", None, "ten", "RTX 1.7"])
def test_another_version_is_refused_with_those_there_are(version: str | None) -> None:
    with pytest.raises(ExportError, match=r"profile jetson-orin: tensorrt_version: .* is not known\. Give 10\.3 or"):
        generation_of(with_version(version))


def test_the_forms_of_each_component(tiny_student: Path) -> None:
    both, exact = ("fused", "fp16"), ("typed", "exact")
    forms = {entry: EXPORTER.forms(program) for entry, program in programs(tiny_student).items()}
    decoder = (both, TYPED, exact, INT8)
    assert forms == {
        "lm": (both, TYPED, exact),
        "image_decoder": decoder,
        "image_encoder": (TYPED, exact),
        "audio_decoder": decoder,
        "audio_encoder": (TYPED, exact),
    }


def test_what_a_profile_asks_for_can_be_made(tiny_student: Path) -> None:
    for name in (JETSON, "jetson-orin-nano", "jetson-thor", RTX, "h200"):
        profile = load_profile(name)
        for entry, labels in profile.components.items():
            kinds = [tuple(label.split("/")[1:]) for label in labels if label.startswith("tensorrt/")]
            assert kinds, (name, entry)
            for kind in kinds:
                assert EXPORTER.unsupported(programs(tiny_student)[entry], profile, kind) == [], (name, entry, kind)


def test_reasons_against_a_form(tiny_student: Path) -> None:
    program = programs(tiny_student)["lm"]
    assert EXPORTER.unsupported(program, load_profile(RTX), FUSED) == [
        "lm: TensorRT-RTX 1.7.1.116 takes no plugins, which our kernels come as"
    ]
    [reason] = EXPORTER.unsupported(program, with_version("10.3", sm="sm_70"), TYPED)
    assert reason == "lm: sm_70 is no architecture that TensorRT files are made for here"
    name, matrix = next(iter(program.inherited.items()))
    odd = replace(program, inherited={name: replace(matrix, bits=2)})
    assert EXPORTER.unsupported(odd, load_profile(JETSON), TYPED) == []  # in fields of INT4
    assert EXPORTER.unsupported(odd, load_profile(JETSON), FUSED) == [
        f"lm: {name} has 2 bits, our kernels have 4 and 8"
    ]


# --- what is in a file ----------------------------------------------------------------------------------------------


def operators(made: Exported) -> Counter[str]:
    """Counted in the file itself."""
    model = onnx.load(made.path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def test_the_typed_graph_has_standard_operators_alone(typed: Exported) -> None:
    model = onnx.load(typed.path, load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 21)]
    counts = operators(typed)
    assert counts["DequantizeLinear"] == 4 * LAYERS + 1
    assert counts["Softmax"] == LAYERS
    # Every projection of the int4 student has zero points, and with them a correction of its own.
    assert counts["ReduceSum"] == 4 * LAYERS
    assert typed.artifact.operators == dict(sorted(counts.items()))
    assert typed.artifact.precision == {"weights": "int4 g32 + int8 g64", "activations": "float16"}


def test_the_fused_graph_is_five_nodes_a_layer_and_the_head(fused: Exported) -> None:
    counts = operators(fused)
    kernels = {name: count for name, count in counts.items() if name.startswith("Edge")}
    assert kernels == {
        "EdgeNormLinear": LAYERS,
        "EdgeAttention": LAYERS,
        "EdgeAttentionMerge": LAYERS,
        "EdgeLinearResidual": 2 * LAYERS,
        "EdgeNormLinearSwiglu": LAYERS,
        "EdgeHead": 1,
        "EdgeMergeTop": 1,
    }
    assert fused.artifact.options["plugins"] == sorted(kernels)
    assert not {"MatMul", "DequantizeLinear", "Softmax", "Sigmoid"} & set(counts)
    model = onnx.load(fused.path, load_external_data=False)
    for node in model.graph.node:
        held = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.domain == "edge":
            assert (held["plugin_namespace"], held["plugin_version"]) == (b"edge", b"1"), node.name
            assert all(node.input), f"{node.name} leaves an input out, which plugins cannot"
    assert {f.name for f in model.functions} >= set(kernels)


def test_the_native_graph_has_the_cache_update_and_the_attention_of_tensorrt(tiny_student: Path) -> None:
    made = exported(tiny_student, "lm", RTX, TYPED)
    counts = operators(made)
    assert counts["TRT_Attention"] == LAYERS and counts["TRT_KVCacheUpdate"] == counts["RotaryEmbedding"] == 2 * LAYERS
    assert counts["RMSNormalization"] == 2 * LAYERS + 1 and "Softmax" not in counts
    functions = {function.name for function in onnx.load(made.path, load_external_data=False).functions}
    assert functions == {"TRT_Attention", "TRT_KVCacheUpdate"}


def test_states_and_shapes_are_what_the_options_say(typed: Exported, fused: Exported, tiny_student: Path) -> None:
    native = exported(tiny_student, "lm", RTX, TYPED)
    cache = [1, 2, 128, 16]
    for made, states, width in ((typed, "delta", None), (fused, "aliased", 128), (native, "aliased", 128)):
        options = made.artifact.options
        assert options["states"] == states
        assert options["ranges"] == {
            "decode": {"ids": [[1, 1]] * 3},
            "prefill": {"ids": [[1, 1], [1, 64], [1, 128]]},
        }
        outputs = {value.name: value for value in made.model.graph.outputs}
        for state in made.artifact.states:
            assert (state.dtype, list(state.shape)) == ("float16", cache)
            got = outputs[state.output]
            assert got.dtype == ir.DataType.FLOAT16
            assert got.shape is not None and [got.shape[axis] for axis in (0, 1, 3)] == [1, 2, 16]
            assert got.shape[2] == width or (width is None and isinstance(got.shape[2], ir.SymbolicDim))
    assert typed.artifact.options["generation"] == "10.3" and native.artifact.options["generation"] == "rtx"
    assert fused.artifact.options["head"] == {"rows": "rows", "values": "top_values", "ids": "top_ids", "k": 64}


def test_a_decoder_has_one_range_from_what_it_was_traced_with(tiny_student: Path) -> None:
    audio, image = (exported(tiny_student, f"{name}_decoder", JETSON, FUSED) for name in ("audio", "image"))
    assert audio.artifact.options["ranges"] == {"any": {"codes": [[1, 2, 2], [1, 2, 6], [1, 2, 96]]}}
    assert image.artifact.options["ranges"] == {"any": {"codes": [[1, 4, 4], [1, 4, 4], [8, 4, 4]]}}
    assert {"EdgeCodebook", "EdgeBiasActivation"} <= set(operators(audio))
    assert {"EdgeCodebook", "EdgeGroupNormSilu"} <= set(operators(image))
    assert "states" not in audio.artifact.options and "head" not in audio.artifact.options


@pytest.mark.long
def test_scales_that_float16_does_not_hold_are_float32_in_both_forms(
    make_tiny_student: MakeStudent, tmp_path: Path
) -> None:
    package = make_tiny_student(scale_dtype=torch.float32)
    for kind, suffix in ((TYPED, ".columns"), (FUSED, ".scales")):
        model = lower(programs(package)["lm"], kind, GENERATIONS[-1])[1]
        found = {name: value.dtype for name, value in model.graph.initializers.items() if name.endswith(suffix)}
        assert len(found) > 4 * LAYERS and set(found.values()) == {ir.DataType.FLOAT}, kind


# --- the student's own numbers --------------------------------------------------------------------------------------


def read(made: Exported) -> tuple[int, list[str]]:
    """How many of the student's tensors are in the files, and what is not."""
    stored = EXPORTER.read_matrices(made.folder, made.artifact, made.program)
    found = compare(made.artifact.label, made.program, stored, made.student.quantized)
    return found.identical, list(found.mismatches)


@pytest.mark.parametrize("kind", [TYPED, FUSED], ids="/".join)
def test_every_code_scale_and_zero_point_is_read_back(kind: tuple[str, str], tiny_student: Path) -> None:
    made = exported(tiny_student, "lm", JETSON, kind)
    assert read(made) == (3 * len(made.student.quantized), [])


def tied(parts: dict[str, Any], bits: int, columns: int) -> ir.Model:
    """A matrix that is looked up and multiplied with, spelled out."""
    looked_up = built("Lookup", parts, bits, columns, ir.DataType.FLOAT, value("ids", ir.DataType.INT32, [1, "S"]))
    [lookup] = looked_up.graph
    product = ir.node(
        "Product", [lookup.outputs[0], *lookup.inputs[1:]], dict(bits=bits, columns=columns), domain=BUILD
    )
    product.outputs[0].dtype, product.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([1, "S", len(parts["codes"])])
    looked_up.graph.append(product)
    looked_up.graph.outputs[:] = product.outputs
    context = Context(capture("lm", torch.nn.ReLU(), (torch.rand(2),), {}, (TensorSpec("y", "float32", (2,)),), ("x",)))
    for edit in (spell_products, spell_lookups, drop_unused):
        edit(looked_up, context)
    return looked_up


DOWN = "model.layers.1.mlp.down_proj.matrix"


@pytest.mark.parametrize(
    ("kind", "suffix", "part"),
    [
        (TYPED, ".signed", "codes"),
        (TYPED, ".columns", "scales"),
        (TYPED, ".offsets", "zero points"),
        (FUSED, ".codes.words", "codes"),
        (FUSED, ".scales", "scales"),
        (FUSED, ".zeros.words", "zero points"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else value,
)
@pytest.mark.parametrize("high", [False, True], ids=["low byte", "high byte"])
def test_one_changed_byte_is_found(
    kind: tuple[str, str], suffix: str, part: str, high: bool, tiny_student: Path, tmp_path: Path
) -> None:
    made = exported(tiny_student, "lm", JETSON, kind).copied(tmp_path / "changed")
    change(made, f"{DOWN}{suffix}", int(high))
    _, mismatches = read(made)
    assert mismatches and all("layers.1.mlp.down_proj" in name for name in mismatches)
    assert mismatches[0].endswith(part) or suffix == ".offsets"  # half a step makes the whole matrix nothing


def test_copies_of_the_tied_table_that_differ_are_found(typed: Exported, tmp_path: Path) -> None:
    """The lookup and the head hold the same codes in two layouts: a change of either is a mismatch."""
    tables = [name for name in typed.model.graph.initializers if name.endswith(".codes.words")]
    assert len(tables) == 1
    prefix = tables[0].removesuffix(".codes.words")
    for number, name in enumerate((f"{prefix}.codes.words", f"{prefix}.signed", f"{prefix}.scales")):
        made = typed.copied(tmp_path / str(number))
        change(made, name, 1)
        _, mismatches = read(made)
        assert mismatches and all("embed_tokens" in each or "lm_head" in each for each in mismatches), name


@pytest.mark.parametrize("name", ["m.zeros.words", "m.offsets", "m.scales", "m.columns", "m.codes.words", "m.signed"])
def test_copies_of_a_tied_table_with_zero_points_that_differ_are_found(name: str, tmp_path: Path) -> None:
    parts = matrix(4, 32, True, 64, 64)
    model = tied(parts, 4, 64)
    layout = {"m": Inherited(("m",), (64,), 64, 4, 32)}
    with WeightFile(tmp_path / "w.data") as weights:
        weights.adopt(model)
    ir.save(model, tmp_path / "m.onnx")
    stored = read_matrices(tmp_path / "m.onnx", layout)["m"]
    np.testing.assert_array_equal(stored.scales, parts["scales"])
    np.testing.assert_array_equal(stored.zero_points, unpack_bits(parts["zeros"], 4, 2))
    changed = model.graph.initializers[name]
    values = np.array(changed.const_value.numpy())
    values.reshape(-1)[3] += np.array(1, values.dtype)
    changed.const_value = ir.Tensor(values, name=name, dtype=changed.dtype)
    ir.save(model, tmp_path / "changed.onnx")
    assert np.isnan(read_matrices(tmp_path / "changed.onnx", layout)["m"].scales).all()


# --- the same every time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FUSED, pytest.param(TYPED, marks=pytest.mark.long)], ids="/".join)
def test_two_exports_are_byte_identical_and_hold_no_path(
    kind: tuple[str, str], tiny_student: Path, tmp_path: Path
) -> None:
    first = exported(tiny_student, "lm", JETSON, kind)
    [second] = write(tiny_student, "lm", JETSON, [kind], tmp_path)
    assert second.files == first.artifact.files and second.options == first.artifact.options
    for file in second.files:
        content = (tmp_path / file).read_bytes()
        assert content == (first.folder / file).read_bytes(), file
        for trace in (str(tmp_path), str(Path.cwd()), "site-packages", ".py"):
            assert trace.encode() not in content, file


@pytest.mark.long
def test_forms_of_one_component_share_their_weights(tiny_student: Path, tmp_path: Path) -> None:
    one, other = write(tiny_student, "audio_decoder", JETSON, [FUSED, TYPED], tmp_path)
    assert one.files[1] == other.files[1] == "tensorrt/audio_decoder.data"
    sizes = [exported(tiny_student, "audio_decoder", JETSON, kind) for kind in (FUSED,)]
    alone = (sizes[0].folder / sizes[0].artifact.files[1]).stat().st_size
    assert (tmp_path / one.files[1]).stat().st_size < 1.3 * alone


# --- int8 decoders --------------------------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    """Three convolutions; what the last one reads spans many orders of magnitude, which 8 bits do not hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (torch.nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
        self.last.weight.data.abs_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud = torch.exp(12 * self.second(torch.tanh(self.first(x))))
        return torch.log(torch.relu(self.last(loud)) + 1e-3)


@pytest.fixture(scope="module")
def decoder() -> Program:
    output = (TensorSpec("y", "float32", (1, 8, "T")),)
    return capture("audio_decoder", Decoder(), (torch.randn(1, 8, 16),), {"x": {2: "T"}}, output, ("x",))


def signals() -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(4):
        yield {"x": random.standard_normal((1, 8, 32)).astype(np.float32)}


def test_the_layer_that_int8_does_not_hold_stays_in_float_and_is_named(decoder: Program) -> None:
    plan = plan_int8(lower(decoder, ("typed", "exact"), GENERATIONS[-1])[1], signals(), "audio_decoder")
    assert plan.floating == ("last/Conv",) and set(plan.ranges) == {"first/Conv", "second/Conv"}
    assert plan.snr_db >= 23
    largest = max(float(np.abs(feed["x"]).max()) for feed in signals())
    assert plan.ranges["first/Conv"] == pytest.approx(largest, rel=1e-6)
    assert 0 < plan.ranges["second/Conv"] <= 1  # it reads a tanh


def test_without_signals_there_is_no_int8(decoder: Program, tmp_path: Path) -> None:
    with pytest.raises(QuantisationFailed, match=r"audio_decoder: there is no signal to calibrate with\. Ship samples"):
        EXPORTER.export(Job(decoder, load_profile(JETSON), tmp_path, [INT8]))


def test_an_int8_decoder_quantises_its_convolutions_by_explicit_nodes(tiny_student: Path) -> None:
    made = exported(tiny_student, "audio_decoder", JETSON, INT8)
    counts, options = operators(made), made.artifact.options
    quantised = [node for node in made.model.graph if node.op_type == "Conv" and _dequantised(node)]
    assert counts["QuantizeLinear"] == len(quantised) == counts["Conv"] - len(options["float_layers"]) > 0
    assert options["snr_db"] >= 23
    assert made.artifact.precision["weights"] == "int8 per channel"
    assert {node.name for node in made.model.graph if node.op_type == "Conv"} >= set(options["float_layers"])
    codes = [v for v in made.model.graph.initializers.values() if v.name and v.name.endswith(".int8")]
    assert len(codes) == len(quantised) and {v.dtype for v in codes} == {ir.DataType.INT8}


def _dequantised(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs[:2] if value is not None]
    return all(each is not None and each.op_type == "DequantizeLinear" for each in producers)
