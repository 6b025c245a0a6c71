"""The device's one step: the machine against the profile, its state, the command lines, and a machine without a GPU."""

from __future__ import annotations

import ctypes.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles import load_profile
from runtimes.bundle import Bundle, load_bundle
from runtimes.engines import Machine
from runtimes.engines_build import trtexec_command, trtexec_version
from runtimes.finalize import WrongDevice, check_device
from tests.runtimes.bundle_edits import copy_bundle

ORIN = Machine("TensorRT 10.3.0", "sm_87", "Orin", "ab" * 16, "12.6", "linux aarch64")
HAS_GPU = ctypes.util.find_library("cuda") is not None


@pytest.fixture(scope="module")
def original(orin_bundle: Path) -> Bundle:
    return load_bundle(orin_bundle)


@pytest.mark.parametrize(
    ("profile", "machine"),
    [
        ("jetson-orin", ORIN),
        ("jetson-orin", replace(ORIN, compiler="TensorRT 10.3.1", cuda="12.8")),
        ("jetson-thor", replace(ORIN, compiler="TensorRT 10.13.3", sm="sm_110", cuda="13.0")),
        ("h200", replace(ORIN, compiler="TensorRT 11.4.1", sm="sm_90", system="linux x86_64")),
        ("rtx-4090", replace(ORIN, compiler="TensorRT-RTX 1.7.1.116", sm="sm_89", system="linux x86_64")),
    ],
)
def test_the_profiles_own_device_is_taken(profile: str, machine: Machine) -> None:
    plain = load_profile(profile).as_dict()
    check_device({**plain, "os": machine.system.split()[0]}, machine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sm": "sm_110"}, "sm is sm_110, the profile has sm_87"),
        ({"compiler": "TensorRT 10.4.0"}, "TensorRT is 10.4.0, the profile has 10.3"),
        ({"compiler": "TensorRT 8.6.1"}, "TensorRT is 8.6.1"),
        ({"cuda": "12.2"}, "CUDA of the driver is 12.2, the profile has 12.6 or newer"),
        ({"system": "linux x86_64"}, "system is linux x86_64, the profile has linux aarch64"),
    ],
)
def test_another_device_is_refused_by_what_differs(change: dict[str, str], words: str) -> None:
    with pytest.raises(WrongDevice, match=words):
        check_device(load_profile("jetson-orin").as_dict(), replace(ORIN, **change))


def test_trtexec_gets_every_shape_range(original: Bundle) -> None:
    artifact = original.artifact("lm", "tensorrt", "typed")
    command = trtexec_command("trtexec", original, artifact, Path("engine"), Path("timings"), 512)
    longest = artifact.options["ranges"]["prefill"]["ids"][2][1]
    for flag in (
        "--profile=0",
        "--profile=1",
        "--minShapes=ids:1x1",
        f"--maxShapes=ids:1x{longest}",
        "--stronglyTyped",
        "--timingCacheFile=timings",
        "--memPoolSize=workspace:512",
    ):
        assert flag in command
    assert command.index("--profile=1") > command.index("--maxShapes=ids:1x1")


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", "10.3.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec --help", "10.13.3"),
        ("[TensorRT v8502]", None),  # of before 10
        ("usage: another program", None),
        ("", None),
    ],
)
def test_the_version_of_trtexec(banner: str, version: str | None) -> None:
    assert trtexec_version(banner) == version


def finalize(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtimes.finalize", str(folder)], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU: the command really runs here")
def test_without_a_gpu_one_message_and_nothing_changes(original: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(original.folder, tmp_path / "bundle")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = finalize(folder)
    assert done.returncode == 2 and done.stderr.startswith("error: libcuda.so.1: there is no CUDA driver here")
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["model", "kernels", "plugin"])
def test_one_bit_of_the_bundle_is_refused_before_anything_is_loaded(
    original: Bundle, tmp_path: Path, name: str
) -> None:
    folder = copy_bundle(original.folder, tmp_path / "bundle")
    lm = original.artifact("lm", "tensorrt", "fused")
    places = {
        "model": lm.model,
        "kernels": "tensorrt/kernels/edge_sm_87.ptx",
        "plugin": "tensorrt/plugin/library/ops.txt",
    }
    path = folder / places[name]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    done = finalize(folder)
    assert done.returncode == 2 and "does not have the manifest's SHA-256" in done.stderr and str(path) in done.stderr


def test_a_bundle_without_tensorrt_has_nothing_to_finish(tiny_bundle: Path) -> None:
    done = finalize(tiny_bundle)
    assert done.returncode == 2 and "has no artifact of TensorRT to finish" in done.stderr


def test_what_the_device_writes_may_be_there(original: Bundle) -> None:
    listed = json.loads((original.folder / "manifest.json").read_text())["mutable"]
    for name in ("engines/lm.fused.fp16.engine", "engines/lm.fused.fp16.json", "engines/timing.cache"):
        assert name in listed
    assert load_bundle(original.folder).mutable
