from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.cuda_kernels import ops
from tools.bench_cuda_cases import Case
from tools.bench_cuda_table import OP_OF
from tools.cuda_kernels import SANITIZE, HostKernels, build_host

ROOT = Path(__file__).parents[2]
#: Multiprocessors that plans are made for in tests: Orin's, so that grids stride and splits differ between shapes.
SMS = 16


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory) -> Callable[[str], HostKernels]:
    """op -> its kernels, compiled once for this CPU; with EDGE_SANITIZE, under the address and undefined sanitizers."""
    folder = tmp_path_factory.mktemp("kernels")
    extra = SANITIZE if os.environ.get("EDGE_SANITIZE") else ()
    return functools.cache(lambda op: HostKernels(build_host(ops()[op], folder / f"{op}.so", extra=extra)))


@pytest.fixture(scope="session")
def run_case(host_kernels) -> Callable[..., float]:
    """Plans and runs a case on the CPU and checks it; returns the share of its limit that the worst element takes."""

    def run(case: Case, *, op: str = "", sms: int = SMS) -> float:
        name, fields = case.plan
        kernels = host_kernels(op or OP_OF.get(name, name))
        launches = kernels(name, *fields, sms)
        assert launches, f"{case.name}: no plan"
        arguments = list(case.arguments)
        for position in case.outputs:
            arguments[position] = arguments[position].copy()
        for position, output in case.aliases.items():
            arguments[position] = arguments[output]
        for launch in launches:
            kernels.launch(launch, arguments)
        return case.check(arguments)

    return run
