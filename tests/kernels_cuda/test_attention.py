"""EdgeAttention and EdgeAttentionMerge against float64, the kernels' own source run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels_cuda.conftest import SMS
from tools.bench_cuda_cases_attention import AttentionCase, attention, attention_merge

CACHES = pytest.mark.parametrize("int8", [False, True], ids=["f16", "i8"])
#: B, H, KV, D, C, last, options: each ratio of heads, widths that fill no tile, the first and the last slot.
STEPS = (
    (1, 4, 4, 64, 96, [95], {}),
    (2, 6, 2, 64, 100, [99, 0], dict(splits=4)),
    (1, 16, 2, 128, 258, [200], dict(splits=3)),
    (2, 8, 2, 128, 130, [63, 129], dict(splits=8)),
    (1, 5, 1, 32, 70, [69], dict(splits=2, softcap=5.0)),
    (1, 12, 1, 16, 40, [33], dict(splits=2)),
    (1, 7, 1, 96, 150, [149], dict(splits=3, window=37)),
    (2, 4, 2, 80, 300, [299, 20], dict(splits=5, window=64, softcap=2.0)),
    (1, 8, 1, 256, 90, [77], dict(splits=2)),
    (1, 3, 3, 24, 50, [0], dict(splits=16)),
    (1, 2, 1, 200, 44, [43], dict(splits=3, window=1)),
    (1, 20, 1, 64, 64, [40], {}),
)
#: B, S, H, KV, D, C, last, options: chunks from the start and later, that cross tiles, and padded in front (last < S).
CHUNKS = (
    (1, 5, 4, 4, 64, 64, [4], {}),
    (1, 70, 2, 1, 64, 160, [150], {}),
    (2, 17, 6, 2, 128, 96, [95, 40], dict(splits=20)),
    (1, 33, 8, 1, 64, 80, [60], dict(softcap=3.0)),
    (2, 9, 7, 1, 32, 150, [149, 8], dict(window=11)),
    (1, 66, 3, 3, 80, 200, [190], dict(window=40)),
    (1, 18, 2, 1, 256, 60, [40], {}),
    (1, 4, 2, 2, 24, 30, [29], dict(window=1)),
    (2, 12, 2, 1, 96, 40, [5, 30], {}),
    (1, 2, 16, 1, 128, 70, [69], {}),
)


@pytest.fixture
def run(host_kernels):
    """Runs a case with present in the memory of past, as in a session."""

    def run(case: AttentionCase) -> float:
        kernels = host_kernels("attention")
        (launch,) = kernels("attention", *case.plan[1], SMS)
        arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in case.arguments]
        for past, (present, *_) in enumerate(case.caches, start=1):
            arguments[past] = arguments[present]
        kernels.launch(launch, arguments)
        return case.check(arguments)

    return run


@CACHES
@pytest.mark.parametrize("any_kernel", [False, True], ids=["own", "any"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_decode(run, step, any_kernel, int8) -> None:
    B, H, KV, D, C, last, options = step
    run(attention(B, 1, H, KV, D, C, last, int8=int8, any_kernel=any_kernel, **options))


@CACHES
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_prefill(run, chunk, int8) -> None:
    B, S, H, KV, D, C, last, options = chunk
    run(attention(B, S, H, KV, D, C, last, int8=int8, any_kernel=S % 2 == 0, **options))


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 64, 1), (2, 1, 2, 128, 40), (1, 1, 2, 24, 9), (2, 6, 3, 80, 6), (1, 5, 2, 256, 16)], ids=str
)
def test_merge(run_case, shape) -> None:
    run_case(attention_merge(*shape), op="attention")


def test_shapes_that_no_kernel_takes(host_kernels) -> None:
    plan = host_kernels("attention")
    assert plan("attention", 0, 1, 1, 4, 2, 64, 63, 1, 0, SMS)
    assert not plan("attention", 1, 1, 1, 4, 2, 64, 63, 1, 0, SMS), "an int8 cache of odd capacity"
    assert not plan("attention", 0, 1, 1, 4, 2, 60, 64, 1, 0, SMS), "a head dim that is no multiple of 8"
    assert not plan("attention", 0, 1, 1, 4, 2, 264, 64, 1, 0, SMS), "a head dim above 256"
    assert not plan("attention", 0, 1, 1, 5, 2, 64, 64, 1, 0, SMS), "heads that do not share evenly"
    assert not plan("attention_merge", 1, 5, 4, 64, 4, SMS), "fewer rows than tokens"


def test_weights_of_a_decode_step_keep_float32(run) -> None:
    """Rounded to one half each they would take several times this share of the limit."""
    assert run(attention(1, 1, 8, 1, 64, 512, [511], seed=3)) < 0.05
