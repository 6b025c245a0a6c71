"""The student's codes, scales and zero points, read back from the files; one changed bit is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_profiles import load_profile
from exporters import inheritance
from exporters.backends import Job
from exporters.inheritance import Inheritance
from exporters.onnx_ import OnnxExporter
from exporters.onnx_weights import read_matrices
from tests.exporters.conftest import ExportedLm, ExportLm
from tools.format_matrix import load

PREFIX = "model.layers.1.self_attn.qkv_proj.matrix"
FIRST, LAST = (f"model.layers.1.self_attn.{part}_proj" for part in "qv")


def read_back(exported: ExportedLm, folder: Path, form: str, mode: str = "exact") -> Inheritance:
    artifact = exported.artifacts[form, mode]
    stored = read_matrices(folder / artifact.model)
    return inheritance.compare(artifact.label, exported.program, stored, exported.student.quantized)


@pytest.mark.parametrize("variant", ["int4", "int8"])
def test_all_of_it_arrives_in_every_form(exported_lm: ExportLm, variant: str) -> None:
    exported = exported_lm(variant)
    sources = [source for matrix in exported.program.inherited.values() for source in matrix.sources]
    assert sorted(sources) == sorted(exported.student.quantized)
    assert len(sources) == 2 * 7 + 1
    for form, mode in exported.artifacts:
        found = read_back(exported, exported.folder, form, mode)
        assert found == Inheritance(3 * len(sources), 3 * len(sources), ())


def flip_bit(path: Path, name: str, at_end: bool) -> None:
    """Changes one bit of an initializer's first or last byte, in the data file or, where it is small, in the model."""
    model = onnx.load(path, load_external_data=False)
    [tensor] = [t for t in model.graph.initializer if t.name == name]
    entry = {item.key: item.value for item in tensor.external_data}
    where = path.with_name(entry["location"]) if entry else path
    raw = bytearray(where.read_bytes())
    start, length = (int(entry["offset"]), int(entry["length"])) if entry else (0, len(tensor.raw_data))
    if not entry:
        own = tensor.SerializeToString()
        start = raw.index(own) + own.index(tensor.raw_data)
    raw[start + (length - 1 if at_end else 0)] ^= 0x10
    where.write_bytes(raw)


def places() -> Iterator[object]:
    for variant, form, part, ending in (
        ("int4", "fused", "codes", ""),
        ("int4", "fused", "scales", ""),
        ("int4", "fused", "zeros", ""),
        ("int4", "standard", "codes", ".typed"),
        ("int4", "standard", "scales", ""),
        ("int4", "standard", "zeros", ".typed"),
        ("int8", "fused", "codes", ".split"),
        ("int8", "fused", "scales", ".split"),
        ("int8", "fused", "zeros", ".split"),
        ("int8", "standard", "codes", ".typed"),
        ("int8", "standard", "scales", ""),
    ):
        yield pytest.param(variant, form, part, ending, id=f"{variant}-{form}-{part}")


@pytest.mark.parametrize(("variant", "form", "part", "ending"), list(places()))
@pytest.mark.parametrize("at_end", [False, True], ids=["first row", "last row"])
def test_one_changed_bit_is_found_and_named(
    exported_lm: ExportLm, variant: str, form: str, part: str, ending: str, at_end: bool, tmp_path: Path
) -> None:
    exported = exported_lm(variant)
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    artifact = exported.artifacts[form, "exact"]
    flip_bit(folder / artifact.model, f"{PREFIX}.{part}{ending}", at_end)
    found = read_back(exported, folder, form)
    what = {"codes": "codes", "scales": "scales", "zeros": "zero points"}[part]
    assert found.mismatches == (f"{artifact.label}: {PREFIX} ({LAST if at_end else FIRST}) {what}",)
    assert found.identical == found.total - 1


def test_a_matrix_that_is_missing_is_named(exported_lm: ExportLm) -> None:
    exported = exported_lm("int4")
    artifact = exported.artifacts["fused", "exact"]
    stored = dict(read_matrices(exported.folder / artifact.model))
    del stored[PREFIX]
    found = inheritance.compare("here", exported.program, stored, exported.student.quantized)
    assert found.total - found.identical == len(found.mismatches) == 9
    assert found.mismatches[:3] == tuple(
        f"here: {PREFIX} ({FIRST}) {part}" for part in ("codes", "scales", "zero points")
    )


def test_a_weight_that_no_node_multiplies_with_did_not_arrive(exported_lm: ExportLm, tmp_path: Path) -> None:
    exported = exported_lm("int4")
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    path = folder / exported.artifacts["fused", "exact"].model
    model = onnx.load(path, load_external_data=False)
    [node] = [n for n in model.graph.node if f"{PREFIX}.codes" in n.input]
    node.op_type = "SomethingElse"
    onnx.save(model, path)
    found = read_back(exported, folder, "fused")
    assert len(found.mismatches) == 9 and all(PREFIX in name for name in found.mismatches)


def test_reading_back_leaves_no_file_open(exported_lm: ExportLm) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has mapped")
    exported = exported_lm("int4")
    for artifact in exported.artifacts.values():
        stored = read_matrices(exported.folder / artifact.model)
        assert stored and str(exported.folder) not in maps.read_text()


def test_results_of_several_artifacts_add_up() -> None:
    total = Inheritance(2, 3, ("a",)) + Inheritance(4, 4)
    assert total.as_dict() == {"identical": 6, "total": 7, "mismatches": ["a"]}


def test_an_order_that_is_another_is_found_and_named(tmp_path: Path) -> None:
    case = load("gptq-4bit-act-order", tmp_path)
    exporter = OnnxExporter()
    [artifact] = exporter.export(Job(case.program, load_profile("host"), tmp_path / "out", [("fused", "exact")]))
    stored = dict(exporter.read_matrices(tmp_path / "out", artifact, case.program))

    def compared(prefix: str, **changes: object) -> tuple[str, ...]:
        changed = stored | {prefix: replace(stored[prefix], **changes)}
        return inheritance.compare("here", case.program, changed, case.student.quantized).mismatches

    layer = "model.layers.0"
    joined, down = f"{layer}.mlp.gate_up_proj.matrix", f"{layer}.mlp.down_proj.matrix"
    order = stored[joined].order
    assert order is not None and stored[down].order is None
    swapped = order.copy()
    swapped[:2] = order[1::-1]
    wrong = tuple(f"here: {joined} ({layer}.mlp.{part}_proj) order" for part in ("gate", "up"))
    assert compared(joined, order=order) == ()
    assert compared(joined, order=swapped) == compared(joined, order=None) == wrong
    # down_proj's order stands in the rows in front: a gather besides would permute twice, natural rows not at all.
    assert compared(down, order=np.arange(96)) == (f"here: {down} ({layer}.mlp.down_proj) order",)
    natural = np.argsort(case.student.quantized[f"{layer}.mlp.down_proj"].order)
    rows = np.concatenate([natural, natural + natural.size])
    codes = tuple(f"here: {joined} ({layer}.mlp.{part}_proj) codes" for part in ("gate", "up"))
    assert compared(joined, codes=stored[joined].codes[rows]) == codes
