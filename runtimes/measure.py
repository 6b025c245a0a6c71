"""Times one artifact in a process of its own, so that load time and memory are the artifact's alone.

`runtimes.bench` starts this module as `python -m runtimes.measure BUNDLE COMPONENT BACKEND FORM MODE OPTIONS` and
reads the JSON in the last line of its output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from runtimes.bundle import Artifact, Bundle, load_bundle
from runtimes.cli import exit_code
from runtimes.golden import load_feeds
from runtimes.host import (
    Conditions,
    cores_of_others,
    frequency_khz,
    peak_rss_bytes,
    rss_bytes,
    usable_cores,
    why_invalid,
)
from runtimes.sampling import GREEDY, Allowed, Sampler
from runtimes.session import Array, BackendUnavailable, CheckedSession, open_session

# Medians of the first and the last quarter of the passes: further apart than this is not a steady state.
DRIFT = 1.25


@dataclass(frozen=True)
class Effort:
    """How much to run. `soak` tokens more, for the flatness of memory and speed (0: none)."""

    threads: int | None = None
    steps: int = 64
    repeats: int = 5
    soak: int = 0


USUAL = Effort()


@dataclass(frozen=True)
class Figure:
    """One measured value; `where` says on what."""

    metric: str
    value: float
    unit: str
    where: str


@dataclass(frozen=True)
class Measurement:
    """The figures of one artifact, why they are invalid ("" if they are not), and what was noted about the machine."""

    figures: tuple[Figure, ...]
    invalid: str
    notes: Mapping[str, float | None]
    effective: Mapping[str, str] = field(default_factory=dict)


def measure(bundle: Bundle, artifact: Artifact, effort: Effort) -> Measurement:
    """Load, cold, warm and, with a soak, sustained figures. Meant for a fresh process.

    No figures of an artifact that only a stand-in can run here, or nothing at all: `invalid` says which.
    """
    threads = effort.threads or usable_cores()
    before, clock, base = Conditions.now(), frequency_khz(), rss_bytes()
    feeds = load_feeds(bundle, artifact)
    start = time.perf_counter()
    try:
        opened = open_session(bundle, artifact, effort.threads, timing=True)
    except BackendUnavailable as error:
        return Measurement((), str(error), {})
    with opened as session:
        if session.stand_in is not None:
            return Measurement((), f"run on {session.stand_in}", {})
        load = Figure("load", (time.perf_counter() - start) * 1e3, "ms", "open_session, vendor import included")
        timed = _time_lm if artifact.component == "lm" else _time_signal
        figures, steps = timed(bundle, session, feeds, effort)
        peak = Figure("peak_rss", peak_rss_bytes() / 2**20, "MiB", "whole process")
        soaked = _soak(bundle, session, feeds["ids"], effort.soak) if effort.soak and session.capacity else []
    after = Conditions.now()
    reasons = [why_invalid(before, after, threads), _drift(steps)]
    notes = {
        "threads": threads,
        "load": before.load,
        "cores_of_others": cores_of_others(before, after),
        "clock_khz_before": clock,
        "clock_khz_after": frequency_khz(),
    }
    memory = [Figure("base_rss", base / 2**20, "MiB", "process before loading")] if base else []
    invalid = "; ".join(filter(None, reasons))
    return Measurement((load, *figures, peak, *memory, *soaked), invalid, notes, session.effective)


class _Decoder:
    """Greedy decoding over the whole vocabulary, the loop that `shim` is measured on."""

    def __init__(self, bundle: Bundle, session: CheckedSession, prompt: Array) -> None:
        self._session, self._prompt = session, prompt
        self._sampler, self._allowed = Sampler(GREEDY, bundle.vocab_size), Allowed(0, bundle.vocab_size)
        self._step = np.empty((1, 1), np.int32)
        self._feeds = {"ids": self._step}

    def start(self) -> None:
        """Empties the cache, runs the prompt and takes the first token."""
        self._session.reset()
        self._take(self._session.run({"ids": self._prompt}))

    def step(self) -> None:
        """Runs the last token and takes the next."""
        self._take(self._session.run(self._feeds))

    def _take(self, outputs: dict[str, Array]) -> None:
        self._step[0, 0] = self._sampler.pick(outputs["logits"][0], self._allowed)


def _time_lm(
    bundle: Bundle, session: CheckedSession, feeds: dict[str, Array], effort: Effort
) -> tuple[list[Figure], Array]:
    """Figures, and the seconds of a step in each warm pass, in order."""
    prompt = feeds["ids"]
    count = min(effort.steps, session.capacity - prompt.shape[1])
    decoder = _Decoder(bundle, session, prompt)
    clock = time.perf_counter
    start = clock()
    decoder.start()
    cold = clock() - start
    first = np.empty(effort.repeats + 1)
    step = np.empty((effort.repeats + 1, count))
    own = np.empty_like(step)
    for i in range(effort.repeats + 1):
        start = clock()
        decoder.start()
        first[i] = clock() - start
        for j in range(count):
            start = clock()
            decoder.step()
            step[i, j] = clock() - start
            own[i, j] = session.last_run_seconds
    # The first pass warms up; it is not counted.
    first, step, own = first[1:], step[1:], own[1:]
    where = f"prompt of {prompt.shape[1]} tokens, {effort.repeats} x {count} steps"
    rate = 1 / step.mean()
    shim = np.median(step - own)
    figures = [
        Figure("cold", cold * 1e3, "ms", f"first token after load, prompt of {prompt.shape[1]} tokens"),
        Figure("ttft_p50", float(np.median(first)) * 1e3, "ms", where),
        *_percentiles("tpot", step.ravel(), where),
        Figure("tokens_per_second", rate, "tokens/s", where),
        Figure("shim", float(shim) * 1e6, "us/token", f"{where}; all but the runtime's own run, median"),
        Figure("shim_share", float(shim / np.median(step)), "of a step", where),
    ]
    if session.artifact.bytes_per_token:
        figures.append(
            Figure("bytes_per_token", float(session.artifact.bytes_per_token), "bytes", "weights read by a step")
        )
        filled = prompt.shape[1] + count / 2
        sizes = [np.dtype(state.dtype).itemsize * np.prod(state.shape) for state in session.artifact.states]
        cache = float(sum(sizes)) * filled / session.capacity
        figures.append(
            Figure("cache_bytes", cache, "bytes", f"KV cache at {filled:.0f} of {session.capacity} positions")
        )
    # One value per pass: within a pass a step grows with the tokens that are held.
    return figures, np.median(step, axis=1)


def _time_signal(
    bundle: Bundle, session: CheckedSession, feeds: dict[str, Array], effort: Effort
) -> tuple[list[Figure], Array]:
    del bundle
    clock = time.perf_counter
    start = clock()
    session.run(feeds)
    cold = clock() - start
    seconds = np.empty(4 * effort.repeats)
    for i in range(-effort.repeats, len(seconds)):  # negative: warm-up, overwritten by the end of the loop
        start = clock()
        session.run(feeds)
        seconds[i] = clock() - start
    where = f"input {list(next(iter(feeds.values())).shape)}, {len(seconds)} runs"
    return [Figure("cold", cold * 1e3, "ms", "first run after load"), *_percentiles("latency", seconds, where)], seconds


def _percentiles(name: str, seconds: Array, where: str) -> list[Figure]:
    return [Figure(f"{name}_p{p}", float(np.percentile(seconds, p)) * 1e3, "ms", where) for p in (50, 90, 99)]


def _drift(seconds: Array) -> str:
    """Why the timings are no steady state; "" when their first and last quarter agree."""
    quarter = max(1, len(seconds) // 4)
    first, last = float(np.median(seconds[:quarter])), float(np.median(seconds[-quarter:]))
    return (
        f"unsteady: {first * 1e3:.3g} ms at the start, {last * 1e3:.3g} ms at the end"
        if (max(first, last) > DRIFT * min(first, last))
        else ""
    )


def _soak(bundle: Bundle, session: CheckedSession, prompt: Array, tokens: int) -> list[Figure]:
    """Memory and speed over many tokens: growth of the resident memory after the first tenth, and tokens/s at both
    ends. The cache is emptied whenever it is full."""
    decoder = _Decoder(bundle, session, prompt)
    decoder.start()
    tenth = max(1, tokens // 10)
    rates, memory = [], []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(tenth):
            if session.position == session.capacity:
                decoder.start()
            decoder.step()
        rates.append(tenth / (time.perf_counter() - start))
        memory.append(rss_bytes())
    where = f"{10 * tenth} tokens"
    figures = [
        Figure("sustained_first", rates[0], "tokens/s", f"first tenth of {where}"),
        Figure("sustained_last", rates[-1], "tokens/s", f"last tenth of {where}"),
    ]
    if memory[0] is not None and memory[-1] is not None:
        figures.append(
            Figure("rss_growth", (memory[-1] - memory[0]) / 2**10, "KiB", f"after the first tenth of {where}")
        )
    return figures


def main(arguments: Sequence[str]) -> int:
    """BUNDLE COMPONENT BACKEND FORM MODE EFFORT(JSON) -> a Measurement as JSON on stdout."""
    folder, component, backend, form, mode, effort = arguments
    bundle = load_bundle(folder)
    artifact = bundle.artifact(component, backend, form, mode)
    print(json.dumps(asdict(measure(bundle, artifact, Effort(**json.loads(effort))))))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
