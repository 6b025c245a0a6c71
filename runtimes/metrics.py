"""Parity metrics in numpy, computed in float64.

`reference` always comes first. Signals are checked by `require_signal` before any metric: against a constant or a
NaN, most metrics would still print a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.output import DECODED, EmptyOutput

Array = np.ndarray[Any, Any]
HIGHER_IS_BETTER = {"same_top", "psnr", "ssim", "si_snr", "snr", "codes_equal", "identical"}
# Ratios are capped here: equal signals would give infinity, which JSON cannot hold. float64 itself ends near 310 dB.
MAX_DB = 200.0


def require_signal(signal: Array, name: str) -> None:
    """Raises EmptyOutput where a value is not finite or all values are equal (a blank picture, silence)."""
    values = np.asarray(signal)
    if values.size == 0 or not np.isfinite(values).all():
        raise EmptyOutput("is empty or holds NaN or infinity", name, DECODED)
    if float(np.ptp(values)) <= 1e-6 * max(1.0, float(np.abs(values).max())):
        raise EmptyOutput(f"is constant ({float(values.flat[0]):.6g} everywhere)", name, DECODED)


def relative_max_error(reference: Array, result: Array) -> float:
    """max |result - reference| / max |reference|; infinity where the result is not finite."""
    expected, got = _pair(reference, result)
    if not np.isfinite(got).all():
        return float("inf")
    difference = float(np.abs(got - expected).max())
    return (
        difference / scale if (scale := float(np.abs(expected).max())) else (0.0 if difference == 0 else float("inf"))
    )


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(reference: Array, result: Array) -> Array:
    """KL(softmax(reference) || softmax(result)) in nats over the last axis, one value per row.

    -inf logits (masked tokens) are allowed where both have them. Not-finite rows give infinity.
    """
    if np.ndim(reference) > 1 and len(reference):
        return _by_row(kl_divergence, reference, result)
    expected, got = _pair(reference, result)
    with np.errstate(invalid="ignore"):
        p, q = log_softmax(expected), log_softmax(got)
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    rows: Array = terms.sum(axis=-1)
    # Rounding can leave a tiny negative sum; a KL is not negative.
    return np.where(np.isnan(rows), np.inf, np.maximum(rows, 0.0))


def percentile(values: Array, share: float) -> float:
    """The value that `share` per cent of the values do not exceed ("higher": a tail is never interpolated away)."""
    return float(np.percentile(values, share, method="higher"))


def flip_margins(reference: Array, result: Array) -> Array:
    """How much the reference prefers its own best token to the result's, in logits, per row of [..., V].

    NaN where both choose the same token; infinity where the result's row is not finite. With a tie of three the logit
    of the other's choice is what decides, which the top-2 margin would not tell.
    """
    if np.ndim(reference) > 1 and len(reference):
        return _by_row(flip_margins, reference, result)
    expected, got = _pair(reference, result)
    chosen, other = expected.argmax(axis=-1, keepdims=True), got.argmax(axis=-1, keepdims=True)
    best, theirs = (np.take_along_axis(expected, index, -1)[..., 0] for index in (chosen, other))
    margins = np.where((chosen == other)[..., 0], np.nan, best - theirs)
    broken = np.isnan(got).any(axis=-1) | np.isposinf(got).any(axis=-1) | np.isneginf(got).all(axis=-1)
    return np.where(broken, np.inf, margins)


@dataclass(frozen=True)
class TopAgreement:
    """How often two sets of logits choose the same token.

    A flip is a row whose argmax differs. It is a tie, not a fault, when the reference itself prefers its own choice
    by no more than the noise. `first` is the index of the first flip and `first_margin` the reference's margin there
    (logits); None without a flip.
    """

    rows: int
    flips: int
    ties: int
    first: int | None
    first_margin: float | None

    @property
    def same(self) -> float:
        """Share of rows, 0..1, that agree or tie."""
        return 1.0 - (self.flips - self.ties) / self.rows

    @classmethod
    def of(cls, margins: Array, noise: float) -> TopAgreement:
        """From `flip_margins` of all rows in order; `noise` in logits."""
        rows = margins.reshape(-1)
        flips = np.flatnonzero(~np.isnan(rows))
        ties = int((rows[flips] <= noise).sum())
        first = int(flips[0]) if flips.size else None
        return cls(rows.size, flips.size, ties, first, None if first is None else float(rows[first]))


def snr(reference: Array, result: Array) -> float:
    """Signal-to-noise ratio in dB: 10 log10(sum reference^2 / sum (result - reference)^2)."""
    expected, got = _pair(reference, result)
    return _decibel(float((expected**2).sum()), float(((got - expected) ** 2).sum()))


def psnr(reference: Array, result: Array, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error)."""
    expected, got = _pair(reference, result)
    return _decibel(data_range**2, float(((got - expected) ** 2).mean()))


def si_snr(reference: Array, result: Array) -> float:
    """Scale-invariant signal-to-noise ratio in dB of two sounds, each with its mean removed.

    The target is the projection of the result on the reference, so a change of volume costs nothing.
    Source: J. Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019.
    """
    expected, got = (values.reshape(-1) - values.mean() for values in _pair(reference, result))
    target = expected * (float(got @ expected) / float(expected @ expected))
    return _decibel(float(target @ target), float(((got - target) ** 2).sum()))


def ssim(reference: Array, result: Array, data_range: float) -> float:
    """Mean structural similarity over all images and channels of [..., H, W]; 1 is equal.

    Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, positions where the window fits inside.
    Source: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004.
    """
    x, y = _pair(reference, result)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return float(similarity.mean())


def _blur(values: Array) -> Array:
    """Separable Gaussian window over the last two axes, without padding."""
    size = min(11, *values.shape[-2:])
    offsets = np.arange(size) - (size - 1) / 2
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (-1, -2):
        values = np.lib.stride_tricks.sliding_window_view(values, size, axis=axis) @ window
    return values


def _by_row(metric: Callable[[Array, Array], Array], reference: Array, result: Array) -> Array:
    """A metric over the last axis, one row at a time: in float64 all rows of a large vocabulary would be gigabytes."""
    _check_shapes(np.asarray(reference), np.asarray(result))
    return np.stack([metric(expected, got) for expected, got in zip(reference, result, strict=True)])


def _check_shapes(reference: Array, result: Array) -> None:
    if reference.shape != result.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, result {result.shape}")


def _pair(reference: Array, result: Array) -> tuple[Array, Array]:
    expected, got = np.asarray(reference, np.float64), np.asarray(result, np.float64)
    _check_shapes(expected, got)
    return expected, got


def _decibel(signal: float, noise: float) -> float:
    if not np.isfinite(noise) or signal <= 0:
        return -MAX_DB
    return float(np.clip(10 * np.log10(signal / noise), -MAX_DB, MAX_DB)) if noise > 0 else MAX_DB
