"""Faults planted in the files of an artifact are found, with the Program's name of the node they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.families import capture_student
from exporters.passes.mark_origins import MODULE, NODE
from exporters.program import Program
from exporters.student import load_student
from runtimes.bundle import load_bundle
from tests.runtimes.bundle_edits import copy_bundle
from tools.bisect_parity import Finding, bisect, main

LAYER = "model.layers.1"


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(tiny_bundle, tmp_path / "bundle")


def edit(folder: Path, component: str, change: Callable[[ir.Model], str]) -> str:
    """Rewrites the ONNX file of a component, weights inside, after ``change``; returns the name of the node it gave."""
    path = folder / load_bundle(folder).artifact(component).model
    model = ir.load(path)
    for value in model.graph.initializers.values():
        value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
    node = change(model)
    ir.save(model, path)
    return node


def node_of(model: ir.Model, kind: str, module: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == kind and n.metadata_props.get(MODULE, "").startswith(module))


def set_input(node: ir.Node, index: int, values: np.ndarray) -> None:
    node.inputs[index].const_value = ir.Tensor(values, name=node.inputs[index].name)


def wrong_scale(model: ir.Model) -> str:
    node = node_of(model, "MatMulNBits", f"{LAYER}.mlp.down_proj")
    scales = np.array(node.inputs[2].const_value.numpy())
    scales.reshape(-1)[5] *= 3
    set_input(node, 2, scales)
    return node.metadata_props[NODE]


def transposed_weight(model: ir.Model) -> str:
    node = node_of(model, "MatMulNBits", f"{LAYER}.self_attn.o_proj")
    codes = np.array(node.inputs[1].const_value.numpy())
    rows = codes.shape[0]
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(rows, rows)  # square, as this projection is
    turned = np.ascontiguousarray(nibbles.T).reshape(rows, -1, 2)
    set_input(node, 1, (turned[..., 0] | turned[..., 1] << 4).reshape(codes.shape))
    return node.metadata_props[NODE]


def half_overflow(model: ir.Model) -> str:
    """The product of the feed-forward's halves as float16 holds it, at a scale where it does not."""
    node = node_of(model, "MatMulNBits", f"{LAYER}.mlp.down_proj")
    swiglu = node.inputs[0].producer()
    value = node.inputs[0]
    graph, marks = model.graph, {NODE: swiglu.metadata_props[NODE]}
    steps = []
    for kind, attributes, extra in (
        ("Mul", {}, 1e7),
        ("Cast", {"to": ir.DataType.FLOAT16}, None),
        ("Cast", {"to": ir.DataType.FLOAT}, None),
        ("Mul", {}, 1e-7),
    ):
        inputs = [steps[-1].outputs[0] if steps else value]
        if extra is not None:
            constant = ir.Value(name=f"planted{len(steps)}", const_value=ir.Tensor(np.array(extra, np.float32)))
            graph.register_initializer(constant)
            inputs.append(constant)
        attributes_ir = [ir.Attr(name, ir.AttributeType.INT, int(to)) for name, to in attributes.items()]
        steps.append(ir.Node("", kind, inputs, attributes_ir, metadata_props=dict(marks)))
    for step in steps:
        graph.insert_before(node, step)
    node.replace_input_with(0, steps[-1].outputs[0])
    return marks[NODE]


FAULTS = {
    "wrong scale": (wrong_scale, "instead of"),
    "transposed weight": (transposed_weight, "instead of"),
    "fp16 overflow": (half_overflow, "infinite or NaN"),
}


@pytest.fixture(scope="module")
def programs(tiny_student: Path, tiny_bundle: Path) -> Mapping[str, Program]:
    """The student's programs, captured as the tool does it."""
    captured = capture_student(load_student(tiny_student), load_bundle(tiny_bundle).context)
    return {program.entry: program for program in captured}


def find(folder: Path, programs: Mapping[str, Program], component: str) -> Finding | None:
    bundle = load_bundle(folder)
    return bisect(bundle, bundle.artifact(component, "onnx"), programs[component])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(folder: Path, programs: Mapping[str, Program], fault: str) -> None:
    plant, words = FAULTS[fault]
    node = edit(folder, "lm", plant)
    found = find(folder, programs, "lm")
    assert found is not None and (found.block, found.difference.node) == (LAYER, node)
    assert found.module.startswith(f"{LAYER}.") and words in found.difference.what
    assert found.stage == "prefill of 24 tokens"


def test_the_command_prints_the_finding(folder: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = edit(folder, "lm", wrong_scale)
    assert main([str(folder), "--backend", "onnx", "--package", str(tiny_student)]) == 1
    out = capsys.readouterr().out
    assert f"the first block that differs is {LAYER}\n" in out and f"first node: {node} ({LAYER}." in out


def test_an_intact_artifact_has_no_finding(tiny_bundle: Path, programs: Mapping[str, Program]) -> None:
    assert [find(tiny_bundle, programs, component) for component in programs] == [None] * 5


def test_a_transposed_convolution_is_found(folder: Path, programs: Mapping[str, Program]) -> None:
    def transposed(model: ir.Model) -> str:
        square = (n for n in model.graph if n.op_type == "Conv" and len(set(n.inputs[1].shape.numpy()[:2])) == 1)
        node = list(square)[2]
        weight = np.array(node.inputs[1].const_value.numpy())
        set_input(node, 1, np.ascontiguousarray(weight.swapaxes(0, 1)))
        return node.metadata_props[NODE]

    node = edit(folder, "image_decoder", transposed)
    found = find(folder, programs, "image_decoder")
    assert found is not None and found.difference.node == node and found.module.startswith("decoder.")


def test_another_student_is_refused(
    tiny_bundle: Path, make_tiny_student: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_student(variant="float")
    assert main([str(tiny_bundle), "--backend", "onnx", "--package", str(other)]) == 2
    assert "not the student that the bundle was made from" in capsys.readouterr().err
    assert main([str(tiny_bundle), "--backend", "onnx"]) == 2  # not the shipped one either
    assert "--package" in capsys.readouterr().err
