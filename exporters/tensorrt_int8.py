"""Which convolutions of a decoder run in INT8 under TensorRT, and the ranges of their inputs.

Ranges come from ONNX Runtime's calibrator over the student's own signals, on the float32 form of the very graph that
is then quantised; what stays in float is found by sensitivity, with ONNX Runtime's int8 kernels on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

from exporters.external_data import WeightFile
from exporters.passes.drop_unused import drop_unused
from exporters.passes.quantise_convolutions import quantise_convolutions
from exporters.sensitivity import MEASURED, Feeds, Outputs, calibration_samples, float_layers


@dataclass(frozen=True)
class Int8Plan:
    """What is quantised.

    Attributes:
        ranges: name of a Conv node -> largest magnitude of its input.
        floating: names of those that stay in float, the most sensitive first.
        snr_db: of the quantised output against the float one, over the calibration signals.
    """

    ranges: Mapping[str, float]
    floating: tuple[str, ...]
    snr_db: float


class _Reader(CalibrationDataReader):
    """The feeds, one after the other, in the calibrator's protocol."""

    def __init__(self, samples: Sequence[Feeds]) -> None:
        self._rest = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next feed, or None."""
        return next(self._rest, None)


def plan_int8(model: ir.Model, feeds: Iterable[Feeds], where: str) -> Int8Plan:
    """Measures ranges and sensitivities with ``model`` (float32), whose weights move to scratch files: it is used up.

    Raises:
        QuantisationFailed: there is no signal to calibrate with, or nothing is left to quantise.
    """
    samples = calibration_samples(feeds, "tensorrt/int8", where)
    with tempfile.TemporaryDirectory(prefix="int8-") as scratch:
        plain = _write(model, Path(scratch) / "plain")
        ranges = _ranges(plain, samples, Path(scratch))

        def run(names: Iterable[str], count: int) -> Outputs:
            quantised = ir.load(plain)
            quantise_convolutions(quantised, {name: ranges[name] for name in names})
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                return _outputs(_write(quantised, Path(folder)), samples[:count])

        floating, snr_db = float_layers(
            list(ranges),
            lambda floating: run([name for name in ranges if name not in floating], len(samples)),
            lambda name: run([name], MEASURED),
            _outputs(plain, samples),
            where,
        )
    chosen = {name: value for name, value in ranges.items() if name not in floating}
    return Int8Plan(chosen, floating, snr_db)


def _write(model: ir.Model, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    drop_unused(model)
    with WeightFile(folder / "weights") as weights:
        weights.adopt(model)
    path = folder / "model.onnx"
    ir.save(model, path)
    return path


def _ranges(path: Path, samples: Sequence[Feeds], scratch: Path) -> dict[str, float]:
    """Name of a Conv -> largest magnitude of its input over the samples."""
    inputs = {node.name: node.inputs[0].name for node in ir.load(path).graph if node.op_type == "Conv"}
    calibrator = create_calibrator(
        path,
        ["Conv"],
        augmented_model_path=str(path.parent / "observed.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
        use_external_data_format=False,
    )
    calibrator.collect_data(_Reader(samples))
    found = calibrator.compute_data()
    return {name: float(np.abs(found[value].range_value).max()) for name, value in inputs.items()}


def _outputs(path: Path, samples: Sequence[Feeds]) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(sample))[0].astype(np.float64) for sample in samples]
