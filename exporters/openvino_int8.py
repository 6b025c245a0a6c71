"""Quantises the convolutions of a decoder to int8 after training, with NNCF and the student's own signals.

Layers that fall off the cliff are found by sensitivity: each convolution alone is quantised and the noise that it adds
to the output is measured. Such noises add up, so the loudest layers stay in float until the rest together are quiet
enough. (NNCF's own quantize_with_accuracy_control kept 28 of the reference audio decoder's 30 layers in float for
26 dB, and took 91 s.)
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nncf
import numpy as np
import openvino as ov

from exporters.errors import ExportError

Feeds = Mapping[str, np.ndarray]

#: What is quantised. Transposed convolutions stay in float: the CPU plugin's int8 kernel of one took 13.6 ms where the
#: float one takes 0.1 ms (2026.4), and they are the most sensitive layers of the reference audio decoder.
CONVOLUTIONS = ("Convolution", "GroupConvolution")
#: Signal-to-noise ratio of the quantised against the float output that is wanted: half the noise that the gate allows
#: (20 dB, runtimes/gates.py), for signals that calibration did not see.
WANTED_DB = 23.0
#: Signals that the sensitivity is measured with, and the largest number for the ranges of activations.
MEASURED, CALIBRATED = 2, 64


class QuantisationFailed(ExportError):
    """No set of layers in int8 keeps the signal."""


@dataclass(frozen=True)
class Quantised:
    """A decoder with int8 convolutions; transposed ones are float.

    Attributes:
        floating: the Program's nodes of the convolutions that stayed in float, the most sensitive first.
        convolutions: how many there are.
        snr_db: of its output against the float model's, over the calibration signals.
    """

    model: ov.Model
    floating: tuple[str, ...]
    convolutions: int
    snr_db: float


def quantise(model: ov.Model, feeds: Iterable[Feeds], where: str, wanted_db: float = WANTED_DB) -> Quantised:
    """Quantises all convolutions but those that cost too much; ``model`` stays as it is.

    Args:
        feeds: the student's own inputs, one run each.
        where: the component, for errors.

    Raises:
        QuantisationFailed: there is no signal to calibrate with, or nothing is left to quantise.
    """
    samples = [dict(feed) for feed, _ in zip(feeds, range(CALIBRATED), strict=False)]
    if not samples:
        way_out = "Ship samples with the student, or leave openvino/int8 out of the profile."
        raise QuantisationFailed("there is no signal to calibrate with", where=where, way_out=way_out)
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in CONVOLUTIONS]
    expected = _outputs(model, samples)
    everything = _quantised(model, samples, ())
    found = Quantised(everything, (), len(names), _snr(expected, _outputs(everything, samples)))
    noises: dict[str, float] = {}
    while found.snr_db < wanted_db:
        noises = noises or _noises(model, everything, names, samples[:MEASURED], expected[:MEASURED])
        loudest = sorted(noises, key=noises.__getitem__, reverse=True)
        floating = loudest[: _count(noises, loudest, expected, wanted_db, len(found.floating) + 1)]
        if len(floating) == len(names):
            way_out = "Leave openvino/int8 out of the profile."
            raise QuantisationFailed(f"int8 keeps {found.snr_db:.1f} dB of {wanted_db}", where=where, way_out=way_out)
        part = _quantised(model, samples, floating)
        found = Quantised(part, tuple(floating), len(names), _snr(expected, _outputs(part, samples)))
    return replace(found, floating=tuple(name.split("/")[0] for name in found.floating))


def _count(
    noises: Mapping[str, float], loudest: Sequence[str], expected: Sequence[np.ndarray], wanted_db: float, least: int
) -> int:
    """How many of the loudest layers must stay in float for the others' noise to be low enough; ``least`` or more."""
    power = float(np.mean([np.square(x).mean() for x in expected]))
    allowed = power / 10 ** (wanted_db / 10)
    left = np.array([sum(noises[name] for name in loudest[count:]) for count in range(len(loudest) + 1)])
    return max(least, int(np.argmax(left <= allowed)))


def _quantised(model: ov.Model, samples: Sequence[Feeds], floating: Sequence[str]) -> ov.Model:
    others = sorted({node.get_type_name() for node in model.get_ops()} - {*CONVOLUTIONS, "Parameter", "Result"})
    scope = nncf.IgnoredScope(names=list(floating), types=others, validate=False)
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(list(samples)),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations, for which every kernel is there
            subset_size=len(samples),
            ignored_scope=scope,
        )


def _noises(
    model: ov.Model, quantised: ov.Model, names: Sequence[str], samples: Sequence[Feeds], expected: Sequence[np.ndarray]
) -> dict[str, float]:
    """Convolution -> mean square of what quantising it alone changes in the output."""
    noises = {}
    for name in names:
        alone = _with_quantised(model, quantised, name)
        changes = [x - y for x, y in zip(expected, _outputs(alone, samples), strict=True)]
        noises[name] = float(np.mean([np.square(change).mean() for change in changes]))
    return noises


def _with_quantised(model: ov.Model, quantised: ov.Model, name: str) -> ov.Model:
    """A copy of the quantised model in which every convolution but one reads what the float one reads."""
    copy, plain = quantised.clone(), {node.get_friendly_name(): node for node in model.clone().get_ordered_ops()}
    for node in copy.get_ordered_ops():
        label = node.get_friendly_name()
        if node.get_type_name() not in CONVOLUTIONS or label == name:
            continue
        source = node.input_value(0).get_node()
        if source.get_type_name() == "FakeQuantize":
            node.input(0).replace_source_output(source.input_value(0))
        node.input(1).replace_source_output(plain[label].input_value(1))
    return copy


def _outputs(model: ov.Model, samples: Sequence[Feeds]) -> list[np.ndarray]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(compiled(sample)[0], np.float64) for sample in samples]


def _snr(expected: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Signal-to-noise ratio in dB over all signals together."""
    noise = sum(np.square(x - y).sum() for x, y in zip(expected, got, strict=True))
    return float(10 * np.log10(sum(np.square(x).sum() for x in expected) / max(noise, 1e-30)))


@contextlib.contextmanager
def _quiet() -> Any:
    """NNCF lists every ignored node and draws its own progress; the build has one of its own."""
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf.set_log_level(level or logging.INFO)
