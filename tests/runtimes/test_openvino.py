"""The OpenVINO session on the tiny bundle's artifacts, beside ONNX Runtime's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from device_profiles import load_profile
from exporters.backends import Job
from exporters.families import capture_student
from exporters.openvino_ import OpenVinoExporter
from exporters.student import load_student
from runtimes.bundle import Artifact, Bundle, FileInfo, load_bundle
from runtimes.openvino_ import OpenVinoSession
from runtimes.session import BackendUnavailable, KvOverflow, choose_artifact, open_session


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with every mode of the OpenVINO artifacts, made beside it."""
    held = load_bundle(tiny_bundle)
    folder = tmp_path_factory.mktemp("openvino") / "bundle"
    shutil.copytree(tiny_bundle, folder, ignore=shutil.ignore_patterns("openvino"))
    exporter, artifacts = OpenVinoExporter(), []
    for program in capture_student(load_student(tiny_student), held.context):
        kinds = [kind for kind in exporter.forms(program) if kind[0] == "ir"]
        artifacts += exporter.export(Job(program, load_profile("host"), folder, kinds))
    files = {file: FileInfo(0, "") for artifact in artifacts for file in artifact.files}
    others = [artifact for artifact in held.artifacts if artifact.backend == "onnx"]
    return replace(held, folder=folder, artifacts=(*others, *artifacts), files={**held.files, **files})


def chosen(bundle: Bundle, component: str, mode: str = "exact") -> Artifact:
    return choose_artifact(bundle, component, "openvino", "ir", mode)


def logits(session: Any, ids: np.ndarray, split: tuple[int, ...]) -> list[np.ndarray]:
    found, start = [], 0
    for size in split:
        part = np.ascontiguousarray(ids[:, start : start + size])
        found.append(np.array(session.run({"ids": part})["logits"]))
        start += size
    return found


def test_a_conversation_in_pieces_equals_onnx_runtime(bundle: Bundle) -> None:
    ids = np.random.default_rng(0).integers(0, bundle.vocab_size, (1, 40)).astype(np.int32)
    with (
        open_session(bundle, choose_artifact(bundle, "lm", "onnx", "fused", "exact"), 1) as other,
        open_session(bundle, chosen(bundle, "lm"), 1) as session,
    ):
        for split in ((20, 1, 1, 5, 13), (1, 1, 1, 37), (40,)):
            other.reset()
            session.reset()
            expected, got = logits(other, ids, split), logits(session, ids, split)
            for x, y in zip(expected, got, strict=True):
                assert np.abs(x - y).max() < 1e-4 * np.abs(x).max()
            assert session.position == 40


def test_the_cache_ends_where_the_context_does(bundle: Bundle) -> None:
    with open_session(bundle, chosen(bundle, "lm"), 1) as session:
        session.run({"ids": np.zeros((1, bundle.context), np.int32)})
        with pytest.raises(KvOverflow):
            session.run({"ids": np.zeros((1, 1), np.int32)})
        session.reset()
        session.run({"ids": np.zeros((1, 1), np.int32)})
        assert session.position == 1


def effective(bundle: Bundle, component: str, mode: str) -> Mapping[str, str]:
    with open_session(bundle, chosen(bundle, component, mode), 1) as session:
        assert session.stand_in is None
        return session.effective


def test_what_it_computes_in_is_read_from_the_compiled_model(bundle: Bundle) -> None:
    exact = effective(bundle, "lm", "exact")
    assert (exact["precision"], exact["KV cache"]) == ("f32", "f32")
    assert exact["activations quantised in groups of"] == "0"
    assert "bf16" not in exact["layers"] and "u4" in exact["layers"]
    # What the vendor does by itself depends on the machine; it is what a model compiled without a word says.
    core = ov.Core()
    silent = core.compile_model(core.read_model(bundle.folder / chosen(bundle, "lm").model), "CPU")
    fast = effective(bundle, "lm", "fast")
    assert fast["precision"] == silent.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert fast["KV cache"] == silent.get_property("KV_CACHE_PRECISION").get_type_name() != "f32"
    assert int(fast["activations quantised in groups of"]) > 0
    half = effective(bundle, "image_decoder", "fp16")
    able = "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert half["precision"] == ("f16" if able else "f32") and "KV cache" not in half


@pytest.mark.parametrize("mode", ["exact", "fp16"])
def test_a_shape_that_comes_again_gets_a_model_of_its_own_with_the_same_result(bundle: Bundle, mode: str) -> None:
    random = np.random.default_rng(0)
    artifact = chosen(bundle, "image_decoder", mode)
    [spec] = artifact.inputs
    size = bundle.modalities["image"].codebook_size
    one, three = (random.integers(0, size, (n, *spec.shape[1:])).astype(np.int32) for n in (1, 3))
    with OpenVinoSession.open(bundle, artifact, threads=1) as session:
        first = {len(codes): np.array(session.run({"codes": codes})["image"]) for codes in (one, three)}
        assert not session._requests
        for codes in (one, one, three, three, one, three):
            again = session.run({"codes": codes})["image"]
            assert again.shape == first[len(codes)].shape
            assert np.abs(again - first[len(codes)]).max() < 1e-4
        assert len(session._requests) == 2


def test_a_device_that_is_not_here_is_named(bundle: Bundle) -> None:
    for device in ("NPU", "GPU.7", "AUTO:NPU,CPU"):
        elsewhere = replace(chosen(bundle, "lm"), options={"device": device})
        with pytest.raises(BackendUnavailable, match=r"OpenVINO finds no (NPU|GPU\.7).*It finds: .*CPU"):
            open_session(bundle, elsewhere)
    here = replace(chosen(bundle, "lm"), options={"device": "AUTO:CPU"})
    with open_session(bundle, here, 1) as session:
        assert session.run({"ids": np.zeros((1, 3), np.int32)})["logits"].shape == (1, bundle.vocab_size)


def test_the_threads_asked_for_are_used(bundle: Bundle) -> None:
    with OpenVinoSession.open(bundle, chosen(bundle, "lm"), threads=1, timing=True) as session:
        assert session._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1
        session.run({"ids": np.zeros((1, 3), np.int32)})
        assert session.last_run_seconds > 0
