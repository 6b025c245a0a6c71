"""Step `judges`: two small classifiers trained on real data only, which decide whether an output is recognised.

They never see a generated sample, a codec or the student. `image_digit` and `spoken_digit` load
the shipped weights, so a test or a README command can judge a PNG or a WAV.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tools.reference_student import augment
from tools.reference_student.data import PEAK, SAMPLES, audio_batch, image_batch, load_split
from tools.reference_student.spectrum import log_mel
from tools.reference_student.training import arguments, fit

SHIPPED = Path(__file__).parent / "package" / "judges"


class JudgeInputError(ValueError):
    """The array is not a picture or a sound a judge can look at; the message names shape and expectation."""


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class Judge(nn.Module):
    """A VGG-like classifier with 44,000 parameters: float [n,1,h,w] -> logits [n,10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(_stage(1, 16), _stage(16, 32), _stage(32, 40))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(40 * 2, 10)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """float [n,1,h,w] -> [n,10]; any size from 8x8."""
        features = self.stages(planes)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(self.dropout(pooled))


def sound_planes(sounds: torch.Tensor) -> torch.Tensor:
    """float [n,L] -> normalised log-mel planes [n,1,40,frames]."""
    return (log_mel(sounds)[:, None] + 4.0) / 2.5


def train(work: Path, kind: str, steps: int) -> Judge:
    """Train the judge of `kind` ("image" or "audio"); leaves `work/judge_{kind}.pt`."""
    split = load_split(work, "train")
    if kind == "image":
        samples, labels = torch.from_numpy(image_batch(split.images)), torch.from_numpy(split.image_labels)
    else:
        samples, labels = torch.from_numpy(audio_batch(split.recordings)), torch.from_numpy(split.recording_labels)
    model = Judge()

    def loss(step: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(0, len(samples), (64,))
        if kind == "image":
            planes = augment.images(samples[rows])
        else:
            planes = sound_planes(augment.sounds(samples[rows])[:, 0])
            # SpecAugment (Park et al. 2019): hide one band of mel bins, so that no single band decides.
            first, width = int(torch.randint(0, 34, ())), int(torch.randint(0, 7, ()))
            planes[:, :, first : first + width] = 0.0
        logits = model(planes)
        value = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        return {"loss": value, "accuracy": (logits.argmax(1) == labels[rows]).float().mean()}

    return fit(model, loss, work / f"judge_{kind}.pt", steps, 4e-3, weight_decay=0.02)


def _ship(model: Judge, folder: Path, kind: str) -> None:
    """Write the float16 weights (integer counters of batch norm left out)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items() if value.is_floating_point()}
    save_file(state, folder / f"{kind}.safetensors")


@cache
def load(kind: str, folder: Path = SHIPPED) -> Judge:
    """The shipped judge of `kind` in eval mode, float32."""
    model = Judge()
    state = {name: value.float() for name, value in load_file(folder / f"{kind}.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise JudgeInputError(
            f"{folder / kind}.safetensors: missing {missing}, unexpected {unexpected}; run the judges step again"
        )
    return model.eval()


@torch.no_grad()
def image_digits(pixels: np.ndarray, folder: Path = SHIPPED) -> np.ndarray:
    """float32 [n,32,32] in 0..1 (white digit on black) -> digits int64 [n]."""
    return load("image", folder)(torch.from_numpy(pixels)[:, None]).argmax(1).numpy()


@torch.no_grad()
def spoken_digits(sounds: np.ndarray, folder: Path = SHIPPED) -> np.ndarray:
    """float32 [n,5120] at 8 kHz -> digits int64 [n]; each sound is scaled to a peak of 0.9."""
    peak = np.abs(sounds).max(axis=1, keepdims=True)
    scaled = sounds * (PEAK / np.maximum(peak, 1e-6))
    return load("audio", folder)(sound_planes(torch.from_numpy(scaled))).argmax(1).numpy()


def image_digit(array: np.ndarray) -> int:
    """Digit seen in one picture: uint8 or float (0..1), [h,w] of 32x32 or 28x28 pixels, white on black."""
    pixels = np.asarray(array)
    if pixels.shape not in ((32, 32), (28, 28)):
        raise JudgeInputError(f"picture of shape {pixels.shape}: the judge takes one grey 32x32 or 28x28 picture")
    pixels = pixels.astype(np.float32) / (255.0 if pixels.dtype == np.uint8 else 1.0)
    margin = (32 - pixels.shape[0]) // 2
    return int(image_digits(np.pad(pixels, margin)[None])[0])


def spoken_digit(array: np.ndarray) -> int:
    """Digit heard in one sound: int16 or float, [samples] at 8 kHz; longer ones are cut to 0.64 s."""
    sound = np.asarray(array)
    if sound.ndim != 1 or not len(sound):
        raise JudgeInputError(f"sound of shape {sound.shape}: the judge takes one mono sound at 8 kHz")
    sound = sound[:SAMPLES].astype(np.float32) / (32768.0 if sound.dtype == np.int16 else 1.0)
    return int(spoken_digits(np.pad(sound, (0, SAMPLES - len(sound)))[None])[0])


def accuracy(work: Path, split: str, folder: Path) -> dict[str, float]:
    """Share of real samples of a split that each shipped judge recognises."""
    data = load_split(work, split)
    return {
        "image": float((image_digits(image_batch(data.images)[:, 0], folder) == data.image_labels).mean()),
        "audio": float((spoken_digits(audio_batch(data.recordings)[:, 0], folder) == data.recording_labels).mean()),
    }


def main() -> None:
    """Train both judges, ship their weights and print their accuracy on real data."""
    options = arguments(__doc__, image_steps={"type": int, "default": 2500}, audio_steps={"type": int, "default": 2500})
    for kind, steps in (("image", options.image_steps), ("audio", options.audio_steps)):
        _ship(train(options.work, kind, steps), options.work / "judges", kind)
    for split in ("validation", "held_out"):
        print(split, accuracy(options.work, split, options.work / "judges"))


if __name__ == "__main__":
    main()
