"""Quantises the convolutions of a decoder to int8 after training, with NNCF and the student's own signals.

Layers that fall off the cliff are found by sensitivity (exporters/sensitivity.py). (NNCF's own
quantize_with_accuracy_control kept 28 of the reference audio decoder's 30 layers in float for 26 dB, and took 91 s.)
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino as ov

from exporters.sensitivity import MEASURED, WANTED_DB, Feeds, Outputs, calibration_samples, float_layers

#: What is quantised. Transposed convolutions stay in float: the CPU plugin's int8 kernel of one took 13.6 ms where the
#: float one takes 0.1 ms (2026.4), and they are the most sensitive layers of the reference audio decoder.
CONVOLUTIONS = ("Convolution", "GroupConvolution")


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
    samples = calibration_samples(feeds, "openvino/int8", where)
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in CONVOLUTIONS]
    everything = _quantised(model, samples, ())

    def without(floating: Sequence[str]) -> Outputs:
        return _outputs(_quantised(model, samples, floating) if floating else everything, samples)

    def alone(name: str) -> Outputs:
        return _outputs(_with_quantised(model, everything, name), samples[:MEASURED])

    floating, found = float_layers(names, without, alone, _outputs(model, samples), where, wanted_db)
    chosen = _quantised(model, samples, floating) if floating else everything
    return Quantised(chosen, tuple(name.split("/")[0] for name in floating), len(names), found)


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


def _outputs(model: ov.Model, samples: Sequence[Feeds]) -> Outputs:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(compiled(sample)[0], np.float64) for sample in samples]


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
