"""The IR of the tiny student's language model, int8 convolutions, and what is refused before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch

from device_profiles import load_profile
from exporters.backends import Job
from exporters.families.decoder_lm import capture_lm
from exporters.inheritance import compare
from exporters.openvino_ import OpenVinoExporter
from exporters.openvino_convert import Unreadable, convert
from exporters.openvino_int8 import CONVOLUTIONS, quantise
from exporters.program import Program, capture
from exporters.sensitivity import QuantisationFailed
from exporters.student import Student, load_student
from runtimes.bundle import Artifact, TensorSpec
from runtimes.openvino_ import MODES
from tests.conftest import MakeStudent

LAYERS, CAPACITY = 2, 128
PROFILE = load_profile("host")


@dataclass(frozen=True)
class Exported:
    student: Student
    program: Program
    folder: Path
    artifacts: dict[tuple[str, str], Artifact]


def export(student: Student, folder: Path) -> Exported:
    program, exporter = capture_lm(student, CAPACITY), OpenVinoExporter()
    written = exporter.export(Job(program, PROFILE, folder, exporter.forms(program)))
    return Exported(student, program, folder, {(a.form, a.mode): a for a in written})


@pytest.fixture(scope="module")
def int4(make_tiny_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(load_student(make_tiny_student()), tmp_path_factory.mktemp("openvino"))


def model_of(exported: Exported, form: str = "ir", mode: str = "exact") -> ov.Model:
    return ov.Core().read_model(exported.folder / exported.artifacts[form, mode].model)


def layers_of(model: ov.Model, mode: str = "exact") -> Counter[str]:
    compiled = ov.Core().compile_model(model, "CPU", dict(MODES[mode]))
    return Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_compiled_model_is_the_fused_layers(int4: Exported, mode: str) -> None:
    layers = layers_of(model_of(int4), mode)
    assert layers["FullyConnected"] == 4 * LAYERS + 1
    assert layers["RMS"] == 2 * LAYERS + 1
    assert layers["RoPE"] == 2 * LAYERS
    assert layers["ScaledDotProductAttention"] == LAYERS
    assert layers["MemoryInput"] == layers["MemoryOutput"] == 2 * LAYERS
    assert not {"MatMul", "Softmax", "Math", "Reduce"} & set(layers)


def test_codes_are_stored_in_their_bits_and_a_tied_table_once(int4: Exported) -> None:
    kinds = Counter(
        node.get_element_type().get_type_name()
        for node in model_of(int4).get_ops()
        if node.get_type_name() == "Constant" and node.get_friendly_name().endswith(".codes")
    )
    assert kinds == {"u4": 4 * LAYERS, "u8": 1}
    data = int4.folder / int4.artifacts["ir", "exact"].files[1]
    constants = sum(constant.nbytes for constant in int4.program.constants.values())
    assert constants <= data.stat().st_size < 1.05 * constants + 4096


def test_every_code_scale_and_zero_point_is_read_back(int4: Exported) -> None:
    artifact = int4.artifacts["ir", "exact"]
    stored = OpenVinoExporter().read_matrices(int4.folder, artifact, int4.program)
    found = compare(artifact.label, int4.program, stored, int4.student.quantized)
    assert found.identical == found.total == 3 * len(int4.student.quantized)


def test_one_changed_byte_of_the_codes_is_found(int4: Exported, tmp_path: Path) -> None:
    artifact = int4.artifacts["ir", "exact"]
    for file in artifact.files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((int4.folder / file).read_bytes())
    name = "model.layers.1.mlp.down_proj.matrix.codes"
    codes = int4.program.constants[name].load().tobytes()
    data = bytearray((tmp_path / artifact.files[1]).read_bytes())
    data[data.index(codes) + 5] ^= 1
    (tmp_path / artifact.files[1]).write_bytes(data)
    stored = OpenVinoExporter().read_matrices(tmp_path, artifact, int4.program)
    found = compare("changed", int4.program, stored, int4.student.quantized)
    assert found.total - found.identical == 1
    assert "layers.1.mlp.down_proj" in found.mismatches[0] and found.mismatches[0].endswith("codes")


def test_exact_and_fast_share_their_files_and_say_what_they_are(int4: Exported) -> None:
    exact, fast = int4.artifacts["ir", "exact"], int4.artifacts["ir", "fast"]
    assert exact.files == fast.files == ("openvino/lm.ir.xml", "openvino/lm.ir.bin")
    assert exact.precision == {"weights": "int4 g32 + int8 g64", "activations": "float32"}
    assert fast.precision["activations"] != "float32"
    assert exact.runtime == {"openvino": ".".join(ov.__version__.split(".")[:2])}
    assert exact.operators["ReadValue"] == exact.operators["Assign"] == 2 * LAYERS


def test_two_exports_are_byte_identical_and_hold_no_path(int4: Exported, tmp_path: Path) -> None:
    again = export(int4.student, tmp_path)
    for artifact in int4.artifacts.values():
        for file in artifact.files:
            assert (again.folder / file).read_bytes() == (int4.folder / file).read_bytes(), file
        text = (int4.folder / artifact.model).read_text()
        assert str(int4.folder) not in text and str(Path(__file__).parents[2]) not in text


def test_values_inside_are_observed_by_the_programs_names(int4: Exported, tmp_path: Path) -> None:
    artifact = int4.artifacts["ir", "exact"]
    nodes = [node for node in int4.program.exported.graph.nodes if node.op == "call_function"]
    names = [node.name for node in nodes]
    observed, found = OpenVinoExporter().observe(
        int4.folder, artifact, int4.program, [*names, "no_such_node"], tmp_path
    )
    results = int4.program.exported.graph.output_node().args[0]
    caches = {node.name for node in results[len(int4.program.outputs) :]}
    assert set(found) == set(names) - caches  # caches have another form here
    model = ov.Core().compile_model(tmp_path / observed.model, "CPU", dict(MODES["exact"]))
    feeds = {"ids": np.array([[3, 5, 8]], np.int32), "last": np.array([2], np.int32), "beam_idx": np.zeros(1, np.int32)}
    values = model(feeds)
    norm = next(node for node in nodes if "rms_norm" in str(node.target) and "add" not in str(node.target))
    x, got = (np.array(values[found[node.name]], np.float64) for node in (norm.args[0], norm))
    weight = int4.program.constants["model.layers.0.input_layernorm.weight"].load()
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.args[2]) * weight
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


class _Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j1(x).abs()


def odd_program() -> Program:
    output = (TensorSpec("y", "float32", ("S",)),)
    return capture("lm", _Odd(), (torch.ones(3),), {"x": {0: "S"}}, output, ("x",))


def test_an_operator_without_a_rule_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program, exporter = odd_program(), OpenVinoExporter()
    [reason] = exporter.unsupported(program, PROFILE, ("ir", "exact"))
    assert reason == "lm: node special_bessel_j1 calls aten.special_bessel_j1.default, which OpenVINO cannot read"
    with pytest.raises(Unreadable, match=r"node special_bessel_j1 .*--backends"):
        exporter.export(Job(program, PROFILE, tmp_path, [("ir", "exact")]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_width_that_no_type_holds_is_a_reason(int4: Exported) -> None:
    exporter = OpenVinoExporter()
    assert exporter.unsupported(int4.program, PROFILE, ("ir", "exact")) == []
    name, matrix = next(iter(int4.program.inherited.items()))
    odd = replace(int4.program, inherited={name: replace(matrix, bits=3)})
    assert exporter.unsupported(odd, PROFILE, ("ir", "exact")) == [
        f"lm: matrix {name} has 3 bits, OpenVINO holds 2, 4, 8"
    ]


class _Decoder(torch.nn.Module):
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
def decoder() -> ov.Model:
    output = (TensorSpec("y", "float32", (1, 8, "T")),)
    return convert(capture("audio_decoder", _Decoder(), (torch.randn(1, 8, 16),), {"x": {2: "T"}}, output, ("x",)))


def signals() -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(6):
        yield {"x": random.standard_normal((1, 8, 32)).astype(np.float32)}


def quantised_convolutions(model: ov.Model) -> list[str]:
    return [
        node.get_friendly_name().split("/")[0]
        for node in model.get_ordered_ops()
        if node.get_type_name() in CONVOLUTIONS and node.input_value(0).get_node().get_type_name() == "FakeQuantize"
    ]


def test_the_layer_that_falls_off_the_cliff_stays_in_float_and_is_named(decoder: ov.Model) -> None:
    everything = quantise(decoder, signals(), "audio_decoder", -100.0)
    assert everything.floating == () and everything.convolutions == 3
    assert len(quantised_convolutions(everything.model)) == 3
    assert everything.snr_db < 20
    part = quantise(decoder, signals(), "audio_decoder", 20.0)
    assert part.floating == ("conv1d_2",) and part.snr_db >= 20
    assert quantised_convolutions(part.model) == ["conv1d", "conv1d_1"]


def test_a_signal_that_no_int8_layer_keeps_is_an_error(decoder: ov.Model) -> None:
    with pytest.raises(QuantisationFailed, match=r"audio_decoder: int8 keeps .* dB of 200"):
        quantise(decoder, signals(), "audio_decoder", 200.0)
    with pytest.raises(QuantisationFailed, match="no signal to calibrate with"):
        quantise(decoder, iter(()), "audio_decoder")
