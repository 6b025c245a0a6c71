"""Sample sheets for the model card: generated digits, and spectrograms of real, decoded and generated speech."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tools.reference_student import audio_codec, evaluate, generation, image_codec
from tools.reference_student.data import audio_batch, image_batch, load_split
from tools.reference_student.spectrum import log_mel

MARGIN = 2


def sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    """Tiles uint8 [h,w] of one size in rows, on a grey ground."""
    height, width = rows[0][0].shape
    canvas = np.full((len(rows) * (height + MARGIN) + MARGIN, len(rows[0]) * (width + MARGIN) + MARGIN), 96, np.uint8)
    for down, row in enumerate(rows):
        for across, tile in enumerate(row):
            top, left = MARGIN + down * (height + MARGIN), MARGIN + across * (width + MARGIN)
            canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas)


def _tile(picture: torch.Tensor) -> np.ndarray:
    return (picture.numpy() * 255).round().astype(np.uint8)


def spectrogram(sound: torch.Tensor) -> np.ndarray:
    """float [5120] -> uint8 [64,81], low frequencies at the bottom, -60 dB black."""
    planes = log_mel(sound[None], 256, 64, 64)[0].flip(0)
    return ((planes - np.log(1e-3)) / -np.log(1e-3) * 255).clamp(0, 255).numpy().astype(np.uint8)


@torch.no_grad()
def write(work: Path, folder: Path) -> None:
    """`digits.png`, a column a digit: real, decoded, then float, int8, int4 twice each. `speech.png`: even digits."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = evaluate.Bench(work)
    data = load_split(work, "held_out")
    first = [int((data.image_labels == digit).nonzero()[0][0]) for digit in range(10)]
    pixels = torch.from_numpy(image_batch(data.images[first]))
    decoded = image_codec.decode(
        bench.image, image_codec.encode(bench.image, (pixels - image_codec.MEAN) / image_codec.STD)
    )
    decoded = (decoded[:, 0] * image_codec.STD + image_codec.MEAN).clamp(0, 1)
    spoken = [int((data.recording_labels == digit).nonzero()[0][0]) for digit in range(10)]
    sounds = torch.from_numpy(audio_batch(data.recordings[spoken]))
    heard = audio_codec.decode(bench.audio, audio_codec.encode(bench.audio, sounds))
    digits = [[_tile(row) for row in pixels[:, 0]], [_tile(row) for row in decoded]]
    speech = [[spectrogram(row) for row in sounds[::2, 0]], [spectrogram(row) for row in heard[::2]]]
    for name in ("float", "int8", "int4"):
        model = evaluate.load_model(work, name, bench.words)
        for seed in (0, 1):
            made = generation.generate_any(
                model, bench.words, evaluate.ask(bench.words, "image", 1)[0], "image", generation.SAMPLED, seed
            )
            digits.append([_tile(row) for row in bench.pictures(made)])
        made = generation.generate_any(
            model, bench.words, evaluate.ask(bench.words, "audio", 1)[0], "audio", generation.SAMPLED
        )
        speech.append([spectrogram(row) for row in bench.sounds(made[::2])])
    sheet(digits).save(folder / "digits.png", optimize=True)
    sheet(speech).save(folder / "speech.png", optimize=True)
