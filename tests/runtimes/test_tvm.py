"""TVM bundles of the tiny student here and, for 64-bit Arm, under qemu-user: sessions and the C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from device_profiles import load_profile
from exporters.build import Request, build
from exporters.tvm_ import LENGTHS
from runtimes import tvm_emulated
from runtimes.bundle import Bundle, load_bundle
from runtimes.parity import Selection, check
from runtimes.session import BackendUnavailable, open_session
from runtimes.tvm_ import BrokenLibrary
from runtimes.tvm_files import ALIGNMENT, BrokenParameters, WrongMachine, aligned
from tests.runtimes.bundle_edits import copy_bundle, edit_fields

COMPONENTS = {"lm", "image_decoder", "image_encoder", "audio_decoder", "audio_encoder"}
PROMPT = [1, 2, 3, 4, 5, 6, 7]


def built(profile: str, package: Path, folder: Path) -> Bundle:
    request = Request(load_profile(profile), package, None, folder, backends=("tvm",), bench=False, allow_failed=True)
    return build(request)[0]


@pytest.fixture(scope="module")
def native(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built("host", tiny_student, tmp_path_factory.mktemp("tvm") / "native")


@pytest.fixture(scope="module")
def foreign(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built("raspberry-pi-5", tiny_student, tmp_path_factory.mktemp("tvm") / "foreign")


def logits(bundle: Bundle, pieces: tuple[int, ...], mode: str = "exact") -> np.ndarray:
    """Of the newest token, after a prompt that was handed over in pieces."""
    ids = np.arange(sum(pieces), dtype=np.int32)[None] * 7 % 100
    with open_session(bundle, bundle.artifact("lm", "tvm", mode=mode), 1) as session:
        for end, size in zip(np.cumsum(pieces), pieces, strict=True):
            result = np.array(session.run({"ids": ids[:, end - size : end]})["logits"])
    return result


def expected_tokens(bundle: Bundle, count: int) -> list[int]:
    ids, tokens = np.array([PROMPT], np.int32), []
    with open_session(bundle, bundle.artifact("lm", "tvm", mode="exact"), 1) as session:
        for _ in range(count):
            tokens.append(int(session.run({"ids": ids})["logits"].argmax()))
            ids = np.array([[tokens[-1]]], np.int32)
    return tokens


def test_every_gate_passes_on_this_machine(native: Bundle) -> None:
    rows = [row for row in check(native, Selection(backend="tvm", threads=1)) if row.gate != "quantisation-loss"]
    assert {row.component for row in rows} == COMPONENTS
    assert {row.status for row in rows} == {"passed"}, [row for row in rows if row.status != "passed"]
    assert all("computed in kernels" in row.where for row in rows if row.gate.startswith("export"))


@pytest.mark.parametrize("pieces", [(70,), (16, 54), (1,) * 5 + (65,), (64, 1, 1, 1, 3)])
def test_every_cut_of_a_prompt_gives_the_same_logits(native: Bundle, pieces: tuple[int, ...]) -> None:
    np.testing.assert_allclose(logits(native, pieces), logits(native, (1,) * 70), atol=2e-5)


def test_a_session_says_which_lengths_it_is_compiled_for(native: Bundle) -> None:
    with open_session(native, native.artifact("lm", "tvm", mode="exact"), 1) as session:
        assert session.lengths[0] == 1 and session.lengths == tuple(n for n in LENGTHS if n <= native.context)
    with open_session(native, native.artifact("image_decoder", "tvm"), 1) as session:
        assert session.lengths == ()


def test_the_callers_thread_is_bound_to_no_core(native: Bundle) -> None:
    before = os.sched_getaffinity(0)
    with open_session(native, native.artifact("lm", "tvm"), 1) as session:
        session.run({"ids": np.zeros((1, 3), np.int32)})
        assert os.sched_getaffinity(0) == before


def test_threads_do_not_change_the_result(native: Bundle) -> None:
    codes = np.arange(4 * 4, dtype=np.int32).reshape(1, 4, 4)
    artifact = native.artifact("image_decoder", "tvm")
    spec = artifact.inputs[0]
    codes = np.zeros([1 if isinstance(size, str) else size for size in spec.shape], np.int32)
    results = []
    for threads in (1, 2):
        with open_session(native, artifact, threads) as session:
            results.append(np.array(session.run({spec.name: codes})[artifact.outputs[0].name]))
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_aligned_arrays_begin_on_a_cache_line() -> None:
    for count in range(1, 40):
        assert aligned((count, 3), "float32").ctypes.data % ALIGNMENT == 0


def test_the_program_decodes_without_python(native: Bundle) -> None:
    import tvm
    import tvm_ffi

    folders = [Path(str(module.__file__)).parent / "lib" for module in (tvm, tvm_ffi)]
    words = [str(native.folder / "tvm/run_bundle"), str(native.folder), "decode", "exact", "6", *map(str, PROMPT)]
    os.chmod(words[0], 0o755)
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, folders)), "PATH": "/nowhere"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert [int(line) for line in done.stdout.split()] == expected_tokens(native, 6)
    words[-1] = "1000000"
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and "no such token: 1000000" in done.stderr


# --- 64-bit Arm -----------------------------------------------------------------------------------------------------


def emulated(bundle: Bundle) -> tuple[tvm_emulated.Emulator, tuple[Path, ...]]:
    return tvm_emulated.check_emulator(bundle.artifact("lm", "tvm", mode="exact"))


def test_every_gate_of_the_arm_bundle_is_a_proxy_that_names_its_stand_in(foreign: Bundle) -> None:
    rows = [row for row in check(foreign, Selection(backend="tvm")) if row.gate.startswith("export")]
    assert {row.component for row in rows} == COMPONENTS
    assert {row.status for row in rows} == {"proxy"}, [row for row in rows if row.status != "proxy"]
    assert all("aarch64 under qemu-user" in row.where for row in rows)


def test_the_arm_program_decodes_under_the_emulator(foreign: Bundle, native: Bundle) -> None:
    emulator, folders = emulated(foreign)
    words = [emulator.command, "-L", emulator.system, "-E", f"LD_LIBRARY_PATH={os.pathsep.join(map(str, folders))}"]
    words += [str(foreign.folder / "tvm/run_bundle"), str(foreign.folder), "decode", "exact", "6", *map(str, PROMPT)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == expected_tokens(native, 6)


def test_arm_and_this_machine_agree(foreign: Bundle, native: Bundle) -> None:
    np.testing.assert_allclose(logits(foreign, (5, 1)), logits(native, (5, 1)), atol=2e-5)


def test_without_an_emulator_the_arm_bundle_waits_for_its_device(
    foreign: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendUnavailable, match="is code for aarch64, and no emulator"):
        open_session(foreign, foreign.artifact("lm", "tvm", mode="exact"))


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(native: Bundle, tmp_path: Path) -> Path:
    return copy_bundle(native.folder, tmp_path / "bundle")


def opened(bundle: Bundle) -> None:
    open_session(bundle, bundle.artifact("lm", "tvm", mode="exact"), 1)


def edit_options(folder: Path, **changes: object) -> Bundle:
    def edit(fields: dict) -> None:  # type: ignore[type-arg]
        for artifact in fields["artifacts"]:
            artifact["options"] |= changes

    return edit_fields(folder, edit)


def test_an_extension_that_the_processor_lacks_is_named_not_met(damaged: Path) -> None:
    bundle = edit_options(damaged, isa=["amx_int99"])
    with pytest.raises(WrongMachine, match="needs amx_int99, this machine has "):
        opened(bundle)


def test_another_devices_code_waits_for_it(damaged: Path) -> None:
    bundle = edit_options(damaged, device="cuda")
    with pytest.raises(BackendUnavailable, match="is code for cuda"):
        opened(bundle)


@pytest.mark.parametrize("content", [b"", b"\x7fELF but not really"])
def test_a_library_that_is_none_is_refused(damaged: Path, content: bytes) -> None:
    (damaged / load_bundle(damaged).artifact("lm", "tvm", mode="exact").model).write_bytes(content)
    with pytest.raises(BrokenLibrary, match="TVM cannot load it"):
        opened(edit_fields(damaged, lambda fields: None))


def test_a_library_of_another_component_is_refused(damaged: Path) -> None:
    bundle = load_bundle(damaged)
    shutil.copy(bundle.file(bundle.artifact("image_decoder", "tvm").model),
                bundle.file(bundle.artifact("lm", "tvm", mode="exact").model))  # fmt: skip
    with pytest.raises(BrokenLibrary, match="run_1"):
        opened(edit_fields(damaged, lambda fields: None))


def test_missing_weights_are_named(damaged: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = damaged / load_bundle(damaged).artifact("lm", "tvm", mode="exact").options["parameters"]
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(BrokenLibrary, match=r"'model.norm.weight' is not among the weights \(1 missing\)"):
        opened(edit_fields(damaged, lambda fields: None))


@pytest.mark.parametrize("keep", [0, 4, 100, -64])
def test_a_truncated_file_of_weights_is_refused(damaged: Path, keep: int) -> None:
    path = damaged / load_bundle(damaged).artifact("lm", "tvm", mode="exact").options["parameters"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenParameters, match="cannot be read"):
        opened(edit_fields(damaged, lambda fields: None))
