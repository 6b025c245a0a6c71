"""A libcuda.so.1 over the host's memory, compiled against the real cuda.h (driver_on_host.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

SOURCE = Path(__file__).with_name("driver_on_host.c")
HEADERS = next((p for p in map(Path, ("/usr/local/cuda/include", "/usr/include")) if (p / "cuda.h").is_file()), None)
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_headers = pytest.mark.skipif(HEADERS is None or COMPILER is None, reason="needs cuda.h and a C compiler")


@cache
def _built() -> Path:
    folder = Path(mkdtemp(prefix="driver-"))
    command = [str(COMPILER), "-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=implicit", "-fPIC"]
    command += ["-shared", f"-I{HEADERS}", str(SOURCE), "-o", str(folder / "libcuda.so.1")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def with_host_driver(**variables: str) -> dict[str, str]:
    """The environment of a process whose driver is that library."""
    return {**os.environ, "LD_LIBRARY_PATH": str(_built()), **variables}
