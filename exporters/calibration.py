"""Feeds of a discretizer's program from the student's own pictures and recordings, to calibrate a quantisation with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from exporters.families.references import REFERENCES
from exporters.golden import package_samples
from exporters.program import Program
from exporters.student import Student

#: Signals at most: calibration gains little from more.
MOST = 64


def calibration_feeds(student: Student, program: Program) -> Iterator[dict[str, np.ndarray]]:
    """One signal (or its codes) at a time; nothing for the language model, which is never quantised again."""
    modality, _, kind = program.entry.partition("_")
    if not kind:
        return
    model = student.discretizer(modality)
    reference = REFERENCES[type(model).__name__]
    held = package_samples(student, modality)
    signals = [None] if held is None else held[:MOST].split(1)
    [source] = program.inputs
    for signal in signals:
        with torch.no_grad():
            values = reference.signal(signal, student.modalities[modality], 1.0)
            if kind == "decoder":
                values = reference.encode(model, values)
        yield {source.name: values.contiguous().numpy()}
