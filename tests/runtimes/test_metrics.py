"""The metrics against independent formulas (scipy), and what they do with ties, blanks and NaN."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal, special, stats

from runtimes import metrics
from runtimes.output import EmptyOutput


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def test_kl_is_the_entropy_of_scipy(random: np.random.Generator) -> None:
    reference, result = random.normal(0, 6, (40, 97)), random.normal(0, 6, (40, 97))
    expected = stats.entropy(special.softmax(reference, -1), special.softmax(result, -1), axis=-1)
    np.testing.assert_allclose(metrics.kl_divergence(reference, result), expected, rtol=1e-10)


def test_log_softmax_is_scipys_and_survives_large_logits(random: np.random.Generator) -> None:
    logits = random.normal(0, 500, (5, 33)).astype(np.float32)
    np.testing.assert_allclose(
        metrics.log_softmax(logits), special.log_softmax(logits.astype(np.float64), -1), atol=1e-9
    )


def test_kl_of_equal_logits_is_zero_and_a_shift_costs_nothing(random: np.random.Generator) -> None:
    logits = random.normal(0, 3, (6, 50))
    assert metrics.kl_divergence(logits, logits).max() == 0
    assert metrics.kl_divergence(logits, logits + 12.5).max() < 1e-12


def test_masked_tokens_are_allowed_in_kl_but_nan_is_infinite() -> None:
    masked = np.array([[0.0, 1.0, -np.inf]])
    assert metrics.kl_divergence(masked, masked)[0] == 0
    assert metrics.kl_divergence(np.zeros((1, 3)), np.array([[0.0, np.nan, 0.0]]))[0] == np.inf


def test_relative_error_is_by_the_largest_reference() -> None:
    reference = np.array([1.0, -4.0, 2.0])
    assert metrics.relative_max_error(reference, np.array([1.0, -4.0, 2.02])) == pytest.approx(0.005)
    assert metrics.relative_max_error(np.zeros(3), np.zeros(3)) == 0
    assert metrics.relative_max_error(np.zeros(3), np.ones(3)) == np.inf
    assert metrics.relative_max_error(reference, np.array([1.0, np.nan, 2.0])) == np.inf


def test_a_flip_within_the_noise_is_a_tie_and_one_beyond_is_a_fault() -> None:
    reference = np.array([[3.0, 2.0, 0.0], [3.0, 2.9995, 0.0], [1.0, 5.0, 0.0], [0.0, 1.0, 2.0]])
    result = np.array([[3.0, 2.0, 0.0], [3.0, 3.0001, 0.0], [5.1, 5.0, 0.0], [0.0, 1.0, 2.0]])
    top = metrics.TopAgreement.of(metrics.flip_margins(reference, result), noise=0.001)
    assert (top.rows, top.flips, top.ties, top.first) == (4, 2, 1, 1)
    assert top.same == pytest.approx(0.75)
    assert top.first_margin == pytest.approx(0.0005)


def test_the_margin_is_to_the_token_that_was_chosen_not_to_the_runner_up() -> None:
    margins = metrics.flip_margins(np.array([[3.0, 2.9999, 0.0]]), np.array([[0.0, 0.0, 1.0]]))
    assert margins[0] == pytest.approx(3.0)


def test_a_row_that_is_not_finite_is_a_flip_whatever_the_noise() -> None:
    reference = np.array([[3.0, 2.0], [3.0, 2.0]])
    top = metrics.TopAgreement.of(metrics.flip_margins(reference, np.array([[3.0, np.nan], [3.0, 2.0]])), noise=100.0)
    assert (top.flips, top.ties, top.same) == (1, 0, 0.5)


def test_the_tail_percentile_is_a_value_that_was_measured() -> None:
    values = np.arange(1000.0)
    assert metrics.percentile(values, 99.9) == 999.0
    assert metrics.percentile(values, 50) == 500.0


def test_ssim_is_the_direct_formula_with_a_two_dimensional_window(random: np.random.Generator) -> None:
    x = random.random((24, 20))
    y = np.clip(x + random.normal(0, 0.1, x.shape), 0, 1)
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        return signal.convolve2d(values, window, mode="valid")

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert metrics.ssim(x[None, None], y[None, None], 1.0) == pytest.approx(expected, abs=1e-12)
    assert metrics.ssim(x, x, 1.0) == pytest.approx(1.0)


def test_ssim_of_a_picture_smaller_than_the_window() -> None:
    picture = np.linspace(0, 1, 16).reshape(4, 4)
    assert metrics.ssim(picture, picture, 1.0) == pytest.approx(1.0)
    assert metrics.ssim(picture, 1 - picture, 1.0) < 0


def test_psnr_and_snr_of_a_known_error() -> None:
    reference = np.array([1.0, -1.0, 1.0, -1.0])
    assert metrics.psnr(reference, reference + 0.1, 2.0) == pytest.approx(20 * np.log10(2.0 / 0.1))
    assert metrics.snr(reference, reference + 0.1) == pytest.approx(20.0)
    assert metrics.psnr(reference, reference, 2.0) == metrics.MAX_DB


def test_si_snr_ignores_volume_and_offset_and_sees_noise(random: np.random.Generator) -> None:
    tone = np.sin(np.arange(800) * 0.1)
    noise = random.normal(0, 1, 800)
    noise -= noise.mean()
    zero_mean = tone - tone.mean()
    noise -= zero_mean * (noise @ zero_mean) / (zero_mean @ zero_mean)
    noise *= np.linalg.norm(zero_mean) / np.linalg.norm(noise) * 10 ** (-30 / 20)
    assert metrics.si_snr(tone, 0.25 * (tone + noise) + 3) == pytest.approx(30.0)
    assert metrics.si_snr(tone, 5 * tone - 1) > 150


@pytest.mark.parametrize(
    "values",
    [np.zeros((1, 1, 8)), np.full(9, 0.7), np.array([0.1, np.nan]), np.array([0.1, np.inf]), np.zeros(0)],
    ids=["silent", "constant", "nan", "infinite", "empty"],
)
def test_what_holds_no_signal_is_refused_by_name(values: np.ndarray) -> None:
    with pytest.raises(EmptyOutput, match="case1 image"):
        metrics.require_signal(values, "case1 image")


def test_a_faint_signal_is_one() -> None:
    metrics.require_signal(np.array([0.0, 1e-3]), "sound")


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.snr(np.ones(3), np.ones((3, 1)))
