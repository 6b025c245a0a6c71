"""Damaged TensorRT files: a typed error of session, parser or exporter each, and never a traceback of the vendor's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_profiles import load_profile
from exporters import tensorrt_rtx
from exporters.backends import Job
from exporters.errors import ExportError
from exporters.program import Constant
from exporters.tensorrt_ import TensorRtExporter
from exporters.tensorrt_rtx import ParserRejected, compile_file
from runtimes.bundle import BundleError
from runtimes.errors import Fault
from runtimes.onnxruntime_ import IncompatibleModel
from runtimes.session import open_session
from tests.refusals import raises
from tests.tensorrt_maker import FUSED, JETSON, TYPED, Exported, exported

DATA = "tensorrt/lm.data"
needs_parser = pytest.mark.skipif(not tensorrt_rtx.installed(), reason=f"{tensorrt_rtx.PACKAGE} is not installed")


@pytest.fixture(params=[TYPED, FUSED], ids="/".join)
def made(request: pytest.FixtureRequest, tiny_student: Path, tmp_path: Path) -> Exported:
    return exported(tiny_student, "lm", JETSON, request.param).copied(tmp_path / "copy")


def opened(made: Exported, tmp_path: Path) -> np.ndarray:
    """Logits of three tokens."""
    with open_session(made.bundle(tmp_path), made.artifact, 1) as session:
        return session.run({"ids": np.array([[1, 2, 3]], np.int32)})["logits"].copy()


def edited(edit: Callable[[onnx.ModelProto], None]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        edit(model)
        return model.SerializeToString()

    return damage


def external(key: str, value: str) -> Callable[[bytes], bytes]:
    """Every reference to the file of weights says something else."""

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value

    return edited(edit)


def first_node(**fields: str) -> Callable[[bytes], bytes]:
    def edit(model: onnx.ModelProto) -> None:
        for name, value in fields.items():
            setattr(model.graph.node[0], name, value)

    return edited(edit)


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def undefined(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "nowhere"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "another file": lambda data: b"PK\x03\x04" + data[4:],
    "weights outside the folder": external("location", "../../../etc/passwd"),
    "weights by an absolute path": external("location", "/etc/passwd"),
    "weights of another name": external("location", "other.data"),
    "offset past the end": external("offset", "99999999999"),
    "negative length": external("length", "-4"),
    "unknown operator": first_node(op_type="Sparkle"),
    "unknown domain": first_node(domain="nowhere"),
    "undefined input": edited(undefined),
    "cycle": edited(cycle),
    "newer opset": edited(lambda model: setattr(model.opset_import[0], "version", 999)),
    "newer format": edited(lambda model: setattr(model, "ir_version", 99)),
}


def test_the_undamaged_copy_runs(made: Exported, tmp_path: Path) -> None:
    logits = opened(made, tmp_path)
    assert logits.shape == made.artifact.outputs[0].shape and np.isfinite(logits).all()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_graph_does_not_open(made: Exported, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    before = made.path.read_bytes()
    made.path.write_bytes(damage(before))
    assert made.path.read_bytes() != before
    with raises(IncompatibleModel, match=rf"lm \(tensorrt/{made.artifact.form}/fp16\)"):
        opened(made, tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_weights_that_are_too_short_do_not_open(made: Exported, part: float, tmp_path: Path) -> None:
    data = made.folder / DATA
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * part)])
    with raises(IncompatibleModel):
        opened(made, tmp_path)


@pytest.mark.parametrize("index", [0, 1], ids=["the graph", "the weights"])
def test_a_missing_file_does_not_open(made: Exported, index: int, tmp_path: Path) -> None:
    bundle = made.bundle(tmp_path)
    (made.folder / made.artifact.files[index]).unlink()
    with raises(Fault):
        open_session(bundle, made.artifact, 1)


def test_a_graph_that_the_manifest_does_not_list_does_not_open(made: Exported, tmp_path: Path) -> None:
    bundle = made.bundle(tmp_path)
    listed = {path: info for path, info in bundle.files.items() if path != made.artifact.model}
    with raises(BundleError, match=r"lm\.\w+\.fp16\.onnx"):
        open_session(replace(bundle, files=listed), made.artifact, 1)


def test_a_kernel_without_its_function_does_not_open(tiny_student: Path, tmp_path: Path) -> None:
    """What a device with plugins is handed is nothing that ONNX Runtime runs, and it says so."""
    made = exported(tiny_student, "lm", JETSON, FUSED).copied(tmp_path / "copy")
    made.path.write_bytes(edited(lambda model: model.ClearField("functions"))(made.path.read_bytes()))
    with raises(IncompatibleModel, match="Edge"):
        opened(made, tmp_path)


#: What TensorRT's parser lets pass: versions that it does not know, and the domain of an operator whose name it knows.
LENIENT = {"newer format", "newer opset", "unknown domain"}


@needs_parser
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in LENIENT])
def test_the_parser_rejects_a_damaged_graph_too(damage: str, tiny_student: Path, tmp_path: Path) -> None:
    made = exported(tiny_student, "lm", JETSON, TYPED).copied(tmp_path / "copy")
    made.path.write_bytes(DAMAGE[damage](made.path.read_bytes()))
    with raises(ParserRejected, match=r"lm\.typed\.fp16\.onnx: the parser of TensorRT-RTX \S+ rejects"):
        compile_file(made.path, "sm_89", {}, engine=False)


def test_a_weight_that_is_too_large_for_float16_ends_the_export_by_name(tiny_student: Path, tmp_path: Path) -> None:
    program = exported(tiny_student, "audio_decoder", JETSON, FUSED).program
    name = next(name for name, constant in program.constants.items() if constant.dtype == "float32")
    shape = program.constants[name].shape
    huge = Constant.of(np.full(shape, 1e5, np.float32))
    job = Job(
        replace(program, constants={**program.constants, name: huge}),
        load_profile(JETSON),
        tmp_path,
        [("typed", "fp16")],
    )
    with raises(ExportError, match=rf"weight {name}: holds 1e\+05, more than float16's 65504\. .*mode exact"):
        TensorRtExporter().export(job)
