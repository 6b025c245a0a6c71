from __future__ import annotations

import pytest

from tools.kernel_library import VARIANTS, load, runs_here

#: What the short run of the tests compiles: the widest vectors and the narrowest. The others differ from these in
#: width and in the integer dot product.
SHORT = ("avx512vnni", "i8mm")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in VARIANTS],
)
def run(request, tmp_path_factory):
    """The kernels of one variant, compiled: (call, tasks) -> None."""
    if not runs_here(request.param):
        pytest.skip(f"{request.param}: neither this CPU nor an emulator runs it")
    return load(request.param, tmp_path_factory.mktemp(request.param))
