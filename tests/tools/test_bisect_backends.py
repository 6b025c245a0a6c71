"""The same planted fault in the files of every other backend is found under the same name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from device_profiles import load_profile
from exporters.backends import Job, load_exporter
from exporters.families.decoder_lm import capture_lm
from exporters.program import Program
from exporters.student import load_student
from runtimes.bundle import Artifact, Bundle, FileInfo, load_bundle
from tools.bisect_parity import bisect

LAYER = "model.layers.1"
MATRIX = f"{LAYER}.mlp.down_proj.matrix"


def in_bytes(path: Path, scales: np.ndarray) -> None:
    """Triples a row of scales where a file holds them as they are, in float32 or float16."""
    data = path.read_bytes()
    for dtype in (np.float32, np.float16):
        held = scales.astype(dtype)
        if (at := data.find(held.tobytes())) >= 0:
            wrong = held.copy()
            wrong[3] *= 3
            path.write_bytes(data[:at] + wrong.tobytes() + data[at + wrong.nbytes :])
            return
    raise AssertionError(f"{path.name} does not hold the scales")


def in_panels(path: Path, scales: np.ndarray) -> None:
    """The same where they lie in the kernels' order, each beside those of its panel's other rows."""
    tensors = load_file(path)
    name = f"{MATRIX}.scales:panels"
    held = tensors[name].copy()
    held[np.isin(held, scales[3])] *= 3
    save_file(tensors | {name: held}, path)


#: backend -> (profile, which of the artifact's files, how a wrong scale is planted there)
BACKENDS: dict[str, tuple[str, str, Callable[[Path, np.ndarray], None]]] = {
    "openvino": ("host", ".bin", in_bytes),
    "tvm": ("host", ".safetensors", in_panels),
    "coreml": ("macbook-m4", "weight.bin", in_bytes),
}


@pytest.fixture(scope="module")
def program(tiny_student: Path, tiny_bundle: Path) -> Program:
    return capture_lm(load_student(tiny_student), load_bundle(tiny_bundle).context)


def exported(backend: str, program: Program, tiny_bundle: Path, out: Path) -> tuple[Bundle, Artifact]:
    """The language model by one backend, beside the golden files of the tiny bundle."""
    job = Job(program, load_profile(BACKENDS[backend][0]), out, [load_exporter(backend).forms(program)[0]])
    [artifact] = load_exporter(backend).export(job)
    shutil.copytree(tiny_bundle / "golden", out / "golden")
    bundle = load_bundle(tiny_bundle)
    files = {path: FileInfo(0, "") for path in artifact.files}
    return replace(bundle, folder=out, files={**bundle.files, **files}), artifact


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_scale_is_found(backend: str, program: Program, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, artifact = exported(backend, program, tiny_bundle, tmp_path)
    assert artifact.mode == "exact"
    assert bisect(bundle, artifact, program) is None
    _, suffix, plant = BACKENDS[backend]
    [file] = [path for path in artifact.files if path.endswith(suffix)]
    plant(tmp_path / file, program.constants[f"{MATRIX}.scales"].load())
    found = bisect(bundle, artifact, program)
    assert found is not None and found.block == LAYER
    assert found.difference.node.startswith("quantized_linear") and found.module == f"{LAYER}.mlp.down_proj"
