"""What may come out of a sampler: never a token outside the allowed ones, and the same again for the same seed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtimes.sampling import Allowed, Sampler, Sampling, SamplingError

VOCAB = 40
logit_rows = arrays(np.float32, VOCAB, elements=st.floats(-50, 50, width=32))
settings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5)),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)


@st.composite
def ranges(draw: st.DrawFn) -> Allowed:
    first = draw(st.integers(0, VOCAB - 1))
    end = draw(st.integers(first + 1, VOCAB))
    also = draw(st.sets(st.integers(0, VOCAB - 1).filter(lambda token: not first <= token < end), max_size=3))
    return Allowed(first, end, tuple(sorted(also)))


@given(logit_rows, settings, ranges())
def test_only_allowed_tokens_come_out(logits: np.ndarray, sampling: Sampling, allowed: Allowed) -> None:
    sampler = Sampler(sampling, VOCAB)
    for _ in range(5):
        token = sampler.pick(logits, allowed)
        assert allowed.first <= token < allowed.end or token in allowed.also


@given(logit_rows, ranges())
def test_greedy_takes_the_largest_allowed_logit(logits: np.ndarray, allowed: Allowed) -> None:
    token = Sampler(Sampling(), VOCAB).pick(logits, allowed)
    candidates = [*range(allowed.first, allowed.end), *allowed.also]
    assert logits[token] == max(logits[candidate] for candidate in candidates)


@given(logit_rows, settings, ranges())
def test_a_seed_repeats(logits: np.ndarray, sampling: Sampling, allowed: Allowed) -> None:
    runs = [[Sampler(sampling, VOCAB).pick(logits, allowed) for _ in range(3)] for _ in range(2)]
    assert runs[0] == runs[1]


@given(logit_rows, st.integers(1, 10), st.integers(0, 100))
# As near as two logits can be, their weights are the same number.
@example(np.float32([1e-44, *[0] * (VOCAB - 1)]), 1, 0)
def test_top_k_draws_from_the_k_largest(logits: np.ndarray, k: int, seed: int) -> None:
    token = Sampler(Sampling(temperature=2.0, top_k=k, seed=seed), VOCAB).pick(logits, Allowed(0, VOCAB))
    assert logits[token] >= np.sort(logits)[-k]


@given(logit_rows, st.floats(0.05, 0.95), st.integers(0, 100))
def test_top_p_draws_from_the_fewest_tokens_that_hold_p(logits: np.ndarray, p: float, seed: int) -> None:
    token = Sampler(Sampling(temperature=1.0, top_p=p, seed=seed), VOCAB).pick(logits, Allowed(0, VOCAB))
    weights = np.exp(logits.astype(np.float64) - logits.max())
    share = weights / weights.sum()
    # Everything strictly more likely than the token holds less than p, or the token would not have been kept.
    assert share[weights > weights[token]].sum() < p + 1e-9


def test_the_frequencies_are_those_of_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), 4)
    drawn = np.bincount([sampler.pick(logits, Allowed(0, 4)) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_temperature_squares_the_odds_when_halved() -> None:
    logits = np.log(np.array([2.0, 1.0], np.float32))
    sampler = Sampler(Sampling(temperature=0.5, seed=5), 2)
    drawn = np.mean([sampler.pick(logits, Allowed(0, 2)) == 0 for _ in range(20_000)])
    assert drawn == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(temperature: float, bad: float) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[11] = bad
    sampler = Sampler(Sampling(temperature=temperature, seed=1), VOCAB)
    with pytest.raises(SamplingError, match="NaN or infinity"):
        sampler.pick(logits, Allowed(10, 20))
    with pytest.raises(SamplingError, match="NaN or infinity"):
        sampler.pick(logits, Allowed(0, 5, also=(11,)))
    assert 0 <= sampler.pick(logits, Allowed(0, 5)) < 5


def test_a_masked_token_never_comes_out() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 7]] = 0.0
    sampler = Sampler(Sampling(temperature=1.0, seed=0), VOCAB)
    assert {sampler.pick(logits, Allowed(0, VOCAB)) for _ in range(50)} == {3, 7}


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("temperature", 1e-9), ("temperature", float("inf")),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan")), ("seed", -3)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(SamplingError, match=option.replace("_", "-")):
        Sampling(**{option: value})  # type: ignore[arg-type]


def test_greedy_allocates_nothing_of_the_size_of_the_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    sampler, allowed = Sampler(Sampling(), logits.size), Allowed(0, logits.size - 1, also=(logits.size - 1,))
    sampler.pick(logits, allowed)
    tracemalloc.start()
    try:
        for _ in range(10):
            sampler.pick(logits, allowed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000
