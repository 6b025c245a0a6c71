from __future__ import annotations

import pytest

from tools.kernel_library import VARIANTS, load, runs_here


@pytest.fixture(scope="session", params=VARIANTS)
def run(request, tmp_path_factory):
    """The kernels of one variant, compiled: (call, tasks) -> None."""
    if not runs_here(request.param):
        pytest.skip(f"{request.param}: neither this CPU nor an emulator runs it")
    return load(request.param, tmp_path_factory.mktemp(request.param))
