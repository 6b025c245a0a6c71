"""Which layers of a quantised decoder must stay in float: found by what each alone adds to the noise of the output.

Such noises add up, so the loudest layers stay in float until the rest together are quiet enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from exporters.errors import ExportError

Outputs = list[np.ndarray]
Feeds = Mapping[str, np.ndarray]

#: Signal-to-noise ratio of the quantised against the float output that is wanted: half the noise that the gate allows
#: (20 dB, runtimes/gates.py), for signals that calibration did not see.
WANTED_DB = 23.0
#: Signals that the sensitivity is measured with, and the largest number for the ranges of activations.
MEASURED, CALIBRATED = 2, 64


class QuantisationFailed(ExportError):
    """No set of layers in int8 keeps the signal."""


def calibration_samples(feeds: Iterable[Feeds], form: str, where: str) -> list[dict[str, np.ndarray]]:
    """At most CALIBRATED feeds.

    Args:
        form: backend and form, as in "openvino/int8", and ``where`` the component, for the error.

    Raises:
        QuantisationFailed: there is none.
    """
    samples = [dict(feed) for feed, _ in zip(feeds, range(CALIBRATED), strict=False)]
    if not samples:
        way_out = f"Ship samples with the student, or leave {form} out of the profile."
        raise QuantisationFailed("there is no signal to calibrate with", where=where, way_out=way_out)
    return samples


def float_layers(
    names: Sequence[str],
    without: Callable[[Sequence[str]], Outputs],
    alone: Callable[[str], Outputs],
    expected: Outputs,
    where: str,
    wanted_db: float = WANTED_DB,
) -> tuple[tuple[str, ...], float]:
    """(layers that stay in float, the most sensitive first; signal-to-noise ratio in dB with the others quantised).

    Args:
        names: the layers that could be quantised.
        without: outputs of the model with all of them quantised but the given ones, for every signal.
        alone: outputs with that one quantised, for the first MEASURED signals.
        expected: outputs of the float model.
        where: the artifact, for errors.

    Raises:
        QuantisationFailed: nothing is left to quantise.
    """
    floating: list[str] = []
    noises: dict[str, float] = {}
    while (found := snr(expected, without(floating))) < wanted_db:
        noises = noises or {name: _noise(expected[:MEASURED], alone(name)) for name in names}
        loudest = sorted(noises, key=noises.__getitem__, reverse=True)
        floating = loudest[: _count(noises, loudest, expected, wanted_db, len(floating) + 1)]
        if len(floating) == len(names):
            way_out = "Leave the form out of the profile."
            raise QuantisationFailed(f"int8 keeps {found:.1f} dB of {wanted_db}", where=where, way_out=way_out)
    return tuple(floating), found


def _noise(expected: Outputs, got: Outputs) -> float:
    """Mean square of what differs."""
    return float(np.mean([np.square(x - y).mean() for x, y in zip(expected, got, strict=True)]))


def _count(noises: Mapping[str, float], loudest: Sequence[str], expected: Outputs, wanted_db: float, least: int) -> int:
    """How many of the loudest layers must stay in float for the others' noise to be low enough; ``least`` or more."""
    power = float(np.mean([np.square(x).mean() for x in expected]))
    allowed = power / 10 ** (wanted_db / 10)
    left = np.array([sum(noises[name] for name in loudest[count:]) for count in range(len(loudest) + 1)])
    return max(least, int(np.argmax(left <= allowed)))


def snr(expected: Outputs, got: Outputs) -> float:
    """Signal-to-noise ratio in dB over all signals together."""
    noise = sum(np.square(x - y).sum() for x, y in zip(expected, got, strict=True))
    return float(10 * np.log10(sum(np.square(x).sum() for x in expected) / max(noise, 1e-30)))
