"""The calls of CUDA's driver, against a library of the same names and prototypes that works on the host's memory.

It is compiled with the real cuda.h: a name that the header does not declare, or an argument of another width, fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtimes.host_driver import needs_headers, with_host_driver

ROOT = Path(__file__).parents[2]
pytestmark = needs_headers


def run(script: str, **variables: str) -> list[str]:
    """What a script prints, in a process whose libcuda.so.1 is the one above."""
    start = "import ctypes, gc, numpy as np\nfrom runtimes.cuda_driver import Driver\n"
    start += "cuda = ctypes.CDLL('libcuda.so.1')\n"
    environment = with_host_driver(**variables)
    done = subprocess.run(
        [sys.executable, "-c", start + script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_the_device_is() -> None:
    script = (
        "driver = Driver(); print(driver.name, driver.uuid, driver.sm, driver.cuda); driver.close(); driver.close()"
    )
    assert run(script + "; print(cuda.edge_left())") == [
        "Orin f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff sm_87 12.6",
        "0",
    ]


def test_copies_there_and_back() -> None:
    script = """
driver = Driver()
host, back = driver.pinned(24), driver.pinned(24)
host[:] = np.arange(24)
cache, new = driver.allocate(60), driver.allocate(24)
driver.to_device(new, host.ctypes.data, 24)
driver.to_host(back.ctypes.data, new, 24)
driver.wait()
print((back == host).all())
driver.copy_rows(cache + 5, 20, new, 8, 8, 3)
whole = driver.pinned(60)
driver.to_host(whole.ctypes.data, cache, 60)
wanted = np.zeros((3, 20), np.uint8)
wanted[:, 5:13] = np.arange(24).reshape(3, 8)
print((whole.reshape(3, 20) == wanted).all())
driver.free(cache)
driver.free(new)
driver.close()
del host, back, whole
gc.collect()
print(cuda.edge_left())
"""
    assert run(script) == ["True", "True", "0"]


def test_pinned_memory_lives_as_long_as_a_view_of_it() -> None:
    script = """
driver = Driver()
view = driver.pinned(8).view(np.float32).reshape(1, 2)
view[...] = 1.5, 2.5
driver.close()
gc.collect()
print(view.tolist(), cuda.edge_pinned())
del view
gc.collect()
print(cuda.edge_pinned(), cuda.edge_left())
"""
    assert run(script) == ["[[1.5, 2.5]] 1", "0 0"]


def test_a_recording_is_launched_and_released() -> None:
    script = """
driver = Driver()
driver.begin_capture()
recorded = driver.end_capture()
driver.launch(recorded)
driver.release(recorded)
driver.close()
print(cuda.edge_left())
"""
    assert run(script) == ["0"]


def test_entering_makes_the_context_the_threads() -> None:
    script = "driver = Driver(); before = cuda.edge_current(); driver.enter(); print(cuda.edge_current() - before)"
    assert run(script) == ["1"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("driver.allocate(1 << 21)", "OutOfDeviceMemory", "cuMemAlloc_v2: out of device memory"),
        ("driver.pinned(1 << 21)", "OutOfDeviceMemory", "cuMemAllocHost_v2: out of device memory"),
        ("driver.copy_rows(0, 1, 0, 8, 8, 3)", "CudaError", "cuMemcpy2DAsync_v2: invalid argument (1)"),
        ("driver.end_capture()", "CudaError", "cuStreamEndCapture: invalid argument (1)"),
    ],
)
def test_what_the_driver_refuses_is_named(call: str, kind: str, words: str) -> None:
    script = f"driver = Driver()\ntry:\n    {call}\nexcept Exception as error:\n    print(type(error).__name__, error)"
    [said] = run(script)
    assert said.startswith(f"{kind} CUDA: {words}")


def test_a_driver_without_a_gpu() -> None:
    script = "try:\n    Driver()\nexcept Exception as error:\n    print(type(error).__name__, error)"
    [said] = run(script, EDGE_NO_GPU="1")
    assert said.startswith("BackendUnavailable libcuda.so.1: finds no GPU")
