"""Model families: thin wrappers that make the libraries' own modules exportable, one file each.

``capture_student`` is the one way in; a new family of discretizer is a file and a row in DISCRETIZERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from exporters.families.audio_codec import capture_audio
from exporters.families.decoder_lm import CacheSteps, capture_lm
from exporters.families.image_vq import capture_image
from exporters.program import Program
from exporters.student import Modality, Student


def _capture_vq_model(model, modality: Modality) -> tuple[Program, ...]:
    return capture_image(model, modality.grid, tuple(modality.preprocessing["size"]))


def _capture_dac_model(model, modality: Modality) -> tuple[Program, ...]:
    return capture_audio(model, modality.grid[0])


#: class of the discretizer -> how its encoder and decoder are captured
DISCRETIZERS: Mapping[str, Callable[..., tuple[Program, ...]]] = {
    "VQModel": _capture_vq_model,
    "DacModel": _capture_dac_model,
}


def capture_student(student: Student, capacity: int, steps: CacheSteps | None = None) -> Iterator[Program]:
    """Captures every entry point of the student, one at a time: ``lm`` first, then the discretizers'.

    Args:
        capacity: positions of the KV cache.
        steps: of an int8 one.
    """
    yield capture_lm(student, capacity, steps)
    for name, modality in student.modalities.items():
        if modality.discretizer is not None:
            model = student.discretizer(name)
            yield from DISCRETIZERS[type(model).__name__](model, modality)
