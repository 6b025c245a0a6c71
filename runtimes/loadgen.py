"""MLPerf LoadGen on a bundle's language model: scenarios SingleStream and Offline. Needs the extra `loadgen`.

One sample is one golden prompt: a prefill and TOKENS greedily decoded tokens, batch 1. The settings are LoadGen's own
but for the duration, so a figure is a LoadGen measurement, not an MLPerf result.
Source: https://github.com/mlcommons/inference, loadgen.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import Fault
from runtimes.sampling import GREEDY, Allowed, Sampler
from runtimes.session import Array, CheckedSession

TOKENS = 16
HEADROOM = 1.5
PROBE_SECONDS = 0.3
SCENARIOS = ("SingleStream", "Offline")
# What LoadGen's summary calls the figure of each scenario.
_FIGURES = {
    "SingleStream": r"90\.0th percentile latency \(ns\)\s*:\s*(\d+)",
    "Offline": r"Samples per second:\s*([\d.]+)",
}


class LoadGenError(Fault):
    """LoadGen is not installed, or its run gave no result."""


@dataclass(frozen=True)
class LoadGenResult:
    """`value` is the 90th percentile latency of a sample in seconds (SingleStream) or samples per second (Offline).
    `valid` is LoadGen's own verdict."""

    scenario: str
    value: float
    valid: bool
    samples: int


def run_loadgen(
    session: CheckedSession, vocab_size: int, prompts: Sequence[Array], scenario: str, seconds: float
) -> LoadGenResult:
    """Runs one scenario for about `seconds`. `prompts` are int32 [1, S]. Raises LoadGenError."""
    try:
        import mlperf_loadgen as loadgen
    except ModuleNotFoundError as error:
        raise LoadGenError("mlcommons_loadgen is not installed", "--loadgen", "pip install '.[loadgen]'") from error
    decode = _decoder(session, vocab_size, prompts)
    served = _Served(loadgen, decode)
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1e3)
    settings.min_query_count = len(prompts) if scenario == "SingleStream" else 1
    # LoadGen makes its queries in advance by the rate that it is told; told too low, it ends before its time is up.
    rate = HEADROOM * _expected_rate(decode, len(prompts))
    settings.offline_expected_qps = rate
    settings.single_stream_expected_latency_ns = int(1e9 / rate)
    with tempfile.TemporaryDirectory() as folder:
        log = loadgen.LogSettings()
        log.enable_trace = False
        log.log_output.outdir = folder
        log.log_output.copy_summary_to_stdout = False
        sut = loadgen.ConstructSUT(served.issue, lambda: None)
        library = loadgen.ConstructQSL(len(prompts), len(prompts), lambda _: None, lambda _: None)
        try:
            loadgen.StartTestWithLogSettings(sut, library, settings, log)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(sut)
        summary = Path(folder, "mlperf_log_summary.txt").read_text(encoding="utf-8")
    if served.error is not None:
        raise served.error
    return _parse(summary, scenario, served.count)


class _Served:
    """The system under test: answers each query in the thread that issues it."""

    def __init__(self, loadgen: Any, decode: Callable[[int], Array]) -> None:
        self._loadgen, self._decode = loadgen, decode
        self.count = 0
        self.error: Fault | None = None

    def issue(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            try:
                tokens = self._decode(sample.index)
            except Fault as error:
                # An exception cannot pass through LoadGen's C++; the query ends and the caller raises it.
                self.error = error
                tokens = np.zeros(1, np.int32)
            self.count += 1
            response = self._loadgen.QuerySampleResponse(sample.id, tokens.ctypes.data, tokens.nbytes)
            self._loadgen.QuerySamplesComplete([response])


def _decoder(session: CheckedSession, vocab_size: int, prompts: Sequence[Array]) -> Callable[[int], Array]:
    sampler, allowed = Sampler(GREEDY, vocab_size), Allowed(0, vocab_size)
    step = np.empty((1, 1), np.int32)

    def decode(index: int) -> Array:
        session.reset()
        outputs = session.run({"ids": prompts[index]})
        tokens = np.empty(TOKENS, np.int32)
        for i in range(TOKENS):
            tokens[i] = step[0, 0] = sampler.pick(outputs["logits"][0], allowed)
            if i + 1 < TOKENS:
                outputs = session.run({"ids": step})
        return tokens

    return decode


def _expected_rate(decode: Callable[[int], Array], count: int) -> float:
    """Samples per second over at least PROBE_SECONDS, after a warm-up of one pass."""
    for index in range(count):
        decode(index)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < PROBE_SECONDS:
        decode(done % count)
        done += 1
    return done / spent


def _parse(summary: str, scenario: str, samples: int) -> LoadGenResult:
    found = re.search(_FIGURES[scenario], summary)
    if found is None:
        raise LoadGenError(
            f"the summary of {scenario} holds no figure", "mlperf_log_summary.txt", summary.strip()[-500:]
        )
    value = float(found[1]) / (1e9 if scenario == "SingleStream" else 1.0)
    return LoadGenResult(scenario, value, "Result is : VALID" in summary, samples)
