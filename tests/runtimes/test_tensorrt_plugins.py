"""Plugins on the device, as far as a machine without TensorRT can tell: the model without its functions, PTX in the
order of TensorRT's arguments, when a library is built again, and what is said where something is missing."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.plugin_sources import plugin_sources
from runtimes import tensorrt_plugins
from runtimes.tensorrt_aot import BrokenKernels, Ptx, _bits, _with_signature, ahead_of_time_ptx
from runtimes.tensorrt_ops import BrokenTable, load_ops
from runtimes.tensorrt_plugins import (
    BrokenModel,
    MissingPlugin,
    PluginBuildFailed,
    Registered,
    build_key,
    built_library,
    packaging_of,
    register,
    strip_functions,
)

TABLE = plugin_sources()["library/ops.txt"]


# --- the model --------------------------------------------------------------------------------------------------------
def function(domain: str, name: str) -> onnx.FunctionProto:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    return helper.make_function(domain, name, ["x"], ["y"], body, [helper.make_opsetid("", 21)])


@pytest.fixture
def model(tmp_path) -> onnx.ModelProto:
    """Two of our functions, one of another domain with the same name, and weights in a file of their own."""
    nodes = [helper.make_node(name, [a], [b], domain=domain) for name, domain, a, b in (
        ("EdgeLinear", "edge", "x", "a"), ("EdgeHead", "edge", "a", "b"), ("EdgeLinear", "trt", "b", "c"))]  # fmt: skip
    nodes.append(helper.make_node("Add", ["c", "w"], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "y")]
    weight = numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("edge", 1), ("trt", 1))]
    functions = [function("edge", "EdgeLinear"), function("trt", "EdgeLinear"), function("edge", "EdgeHead")]
    made = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return onnx.load(tmp_path / "m.onnx", load_external_data=False)


@pytest.mark.parametrize("names", [(), ("EdgeLinear",), ("EdgeLinear", "EdgeHead"), ("EdgeMergeTop",)])
def test_only_the_named_functions_go(model, names) -> None:
    data = model.SerializeToString()
    found = onnx.ModelProto.FromString(strip_functions(data, names))
    expected = onnx.ModelProto.FromString(data)
    del expected.functions[:]
    expected.functions.extend(f for f in model.functions if not (f.domain == "edge" and f.name in names))
    assert found == expected
    assert found.graph.initializer[0].external_data[0].value == "m.data"
    if not names:
        assert strip_functions(data, names) == data


def test_bytes_that_are_no_model_are_refused(model) -> None:
    data = model.SerializeToString()
    whole = onnx.ModelProto.FromString(data)
    refused = 0
    for size in range(1, len(data)):
        try:
            strip_functions(data[:size], ["EdgeLinear"])
            onnx.ModelProto.FromString(data[:size])  # what is taken is whole fields
        except BrokenModel:
            refused += 1
    assert refused > len(data) // 2
    for wrong in (b"\x0b", b"\x00\x01", b"\xff" * 20, b"\xca\x01\xff\xff\xff\xff\x7f", b"\x09\x01"):
        with pytest.raises(BrokenModel, match=r"^ONNX model: "):
            strip_functions(wrong, ["EdgeLinear"])
    assert whole == model


def test_a_broken_function_is_refused(model) -> None:
    with pytest.raises(BrokenModel, match="does not end"):
        strip_functions(b"\xca\x01\x02\x0a\x05", ["EdgeLinear"])  # field 25 whose own field is longer than it


# --- which packaging --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "packaging"),
    [("10.3.0", "library"), ("10.8.0.43", "library"), ("10.9.0", "ahead-of-time"), ("11.4.1", "ahead-of-time")],
)
def test_the_version_decides(version, packaging) -> None:
    assert packaging_of(version) == packaging


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.2.9", "unknown"])
def test_old_versions_are_refused(version) -> None:
    with pytest.raises(MissingPlugin, match=f"TensorRT {version} takes none of our plugins. Use 10.3 or newer"):
        packaging_of(version)


def bundle_of(folder: Path) -> SimpleNamespace:
    """What register reads of a bundle: its folder and its files."""
    for name, path in plugin_sources().items():
        (folder / "tensorrt" / "plugin" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "tensorrt" / "plugin" / name)
    return SimpleNamespace(folder=folder, file=lambda path: folder / path)


def artifact_of(*plugins: str) -> SimpleNamespace:
    options = {"plugins": list(plugins), "sm": "sm_87"}
    return SimpleNamespace(component="lm", label="tensorrt/fused/fp16", options=options)


def test_a_file_without_our_nodes_needs_nothing(tmp_path) -> None:
    assert register(bundle_of(tmp_path), artifact_of(), None, tmp_path) == Registered((), "none")


def test_an_op_that_the_bundle_does_not_have(tmp_path) -> None:
    with pytest.raises(
        MissingPlugin, match=r"^lm \(tensorrt/fused/fp16\): needs EdgeConv, which its plugins do not have"
    ):
        register(bundle_of(tmp_path), artifact_of("EdgeLinear", "EdgeConv"), None, tmp_path)


def test_a_bundle_without_its_table(tmp_path) -> None:
    bundle = SimpleNamespace(folder=tmp_path, file=lambda path: tmp_path / path)
    with pytest.raises(BrokenTable, match=r"ops\.txt: cannot be read"):
        register(bundle, artifact_of("EdgeLinear"), None, tmp_path)
    (tmp_path / "tensorrt" / "plugin" / "library").mkdir(parents=True)
    (tmp_path / tensorrt_plugins.TABLE).write_text("EdgeLinear\nin x f16\n")
    with pytest.raises(BrokenTable, match=r"ops\.txt: is not a table of ops"):
        register(bundle, artifact_of("EdgeLinear"), None, tmp_path)


# --- the library ------------------------------------------------------------------------------------------------------
def test_the_library_is_built_again_when_what_it_was_built_of_changes(tmp_path) -> None:
    sources = bundle_of(tmp_path).folder / "tensorrt" / "plugin"
    key = build_key(sources, "10.3.0")
    assert key == build_key(sources, "10.3.0")
    assert key != build_key(sources, "10.9.0")
    with (sources / "tensorrt" / "plugin.cpp").open("a") as file:
        file.write(" ")
    assert key != build_key(sources, "10.3.0")


def test_a_library_of_these_sources_is_kept(tmp_path) -> None:
    sources = bundle_of(tmp_path).folder / "tensorrt" / "plugin"
    library = tmp_path / "engines" / "libedge_plugins.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF edge-build:" + build_key(sources, "10.3.0").encode() + b"\0")
    assert built_library(sources, library.parent, "10.3.0") == library


@pytest.mark.long
def test_the_library_is_built_or_the_missing_header_named(tmp_path, monkeypatch) -> None:
    sources = bundle_of(tmp_path).folder / "tensorrt" / "plugin"
    folder = tmp_path / "engines"
    if "TensorRT_ROOT" not in os.environ:
        monkeypatch.setenv("TensorRT_ROOT", str(tmp_path / "nowhere"))
        with pytest.raises(
            PluginBuildFailed, match=r"^TensorRT_ROOT: NvInferRuntime\.h, which the plugins need, is not here"
        ):
            built_library(sources, folder, "10.3.0")
        assert not folder.exists()
        return
    library = built_library(sources, folder, "10.3.0")
    before = library.stat().st_mtime_ns
    assert built_library(sources, folder, "10.3.0") == library
    assert library.stat().st_mtime_ns == before
    assert [path.name for path in folder.iterdir()] == ["libedge_plugins.so"]
    (sources / "tensorrt" / "plugin.cpp").write_text("#error no\n")
    with pytest.raises(PluginBuildFailed, match=r"refuses the plugins:(.|\n)*#error no"):
        built_library(sources, folder, "10.3.0")
    assert library.stat().st_mtime_ns == before


def test_without_a_compiler(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PluginBuildFailed, match=r"no C\+\+ compiler, which builds the plugins\. Run apt install g\+\+"):
        built_library(bundle_of(tmp_path).folder / "tensorrt" / "plugin", tmp_path / "engines", "10.3.0")


# --- PTX --------------------------------------------------------------------------------------------------------------
PTX = """//
// Generated by a compiler; { in a comment is no brace
.version 8.5
.target sm_87
.address_size 64

.extern .shared .align 16 .b8 shared[];

\t// .globl\tedge_merge
.visible .entry edge_merge(
\t.param .u64 edge_merge_param_0,
\t.param .u64 .ptr .align 1 edge_merge_param_1,
\t.param .u32 edge_merge_param_2,
\t.param .f32 edge_merge_param_3
)
.maxntid 256, 1, 1
{
\t.reg .f32 %f<2>;
\tld.param.f32 %f1, [edge_merge_param_3];
{ // callseq 0, 0
\t.reg .b32 temp;
} // callseq 0
\tret;
}
.visible .entry edge_other(
\t.param .u64 edge_other_param_0
)
{
\tret;
}
.global .align 4 .b8 table[4];
"""


def test_a_kernel_alone_with_its_parameters_in_another_order() -> None:
    text = Ptx.parse(PTX).alone("edge_merge", ["a", "y", "n", "eps"], ["a", "b", "n", "eps", "y"])
    start, end = PTX.index(".visible .entry edge_merge"), PTX.index("\n.visible .entry edge_other")
    head, tail = PTX[:start], PTX[PTX.index("\n.global") :]
    body = PTX[PTX.index(")\n.maxntid") : end]
    parameters = [".param .u64 edge_merge_param_0", ".param .u64 edge_unused_1", ".param .u32 edge_merge_param_2",
                  ".param .f32 edge_merge_param_3", ".param .u64 .ptr .align 1 edge_merge_param_1"]  # fmt: skip
    ordered = ",\n\t".join(parameters)
    # What stands outside of entry points comes first, as it did before any that uses it.
    assert text == f"{head}\n{tail}.visible .entry edge_merge(\n\t{ordered}\n{body}"


def test_wrong_ptx_is_refused() -> None:
    kernels = Ptx.parse(PTX)
    with pytest.raises(BrokenKernels, match=r"there is no kernel edge_head"):
        kernels.alone("edge_head", [], [])
    with pytest.raises(BrokenKernels, match=r"^edge_merge: has 4 parameters, not 1"):
        kernels.alone("edge_merge", ["a"], ["a"])
    with pytest.raises(BrokenKernels, match=r"^PTX: has no entry point"):
        Ptx.parse("\x7fELF")
    with pytest.raises(BrokenKernels, match=r"^edge_other: has no end"):
        Ptx.parse(PTX[: PTX.rindex("}")])


@pytest.mark.long
def test_every_op_is_cut_out_of_the_real_ptx() -> None:
    from exporters.cuda_kernels import CompilerMissing, compile_ptx

    try:
        text = compile_ptx("sm_90", "13.0").decode()
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    kernels = Ptx.parse(text)
    for op in load_ops(TABLE).values():
        assert op.launch is not None
        pattern = re.sub(r"\{.*?\}", r"[a-z0-9]+", op.launch.kernel)
        names = [name for name in kernels.entries if re.fullmatch(pattern, name)]
        assert names, op.name
        for name in names:
            alone = Ptx.parse(ahead_of_time_ptx(kernels, op, name))
            assert list(alone.entries) == [name]
            parameters = alone.entries[name].split("(", 1)[1].split(")", 1)[0].count(".param")
            assert parameters == len(op.inputs) + len(op.number_arguments) + len(op.outputs)


def test_floats_travel_as_integers() -> None:
    assert _bits(1.0) == 0x3F800000
    assert _bits(-2.0) == np.float32(-2.0).view(np.int32)


def test_signatures_are_what_tensorrt_reads() -> None:
    """tensorrt.plugin.register: tensors, then attributes, each with its kind; aot_impl: then outputs and tactic."""
    trtp = SimpleNamespace(TensorDesc=bytes, KernelLaunchParams=list, SymIntExprs=set)
    op = load_ops(TABLE)["EdgeNormLinear"]
    described = inspect.signature(_with_signature(lambda *a, **k: (a, k), op, trtp))
    assert list(described.parameters) == ["x", "norm", "codes", "scales", "zeros", "bias", "bits", "block", "eps"]
    assert [p.annotation for p in described.parameters.values()] == [bytes] * 6 + [int, int, float]
    assert described.return_annotation == tuple[bytes]
    launched = inspect.signature(_with_signature(lambda *a, **k: (a, k), op, trtp, launch=True))
    assert list(launched.parameters)[9:] == ["outputs", "tactic"]
    assert launched.return_annotation == tuple[bytes, bytes, list, set]
