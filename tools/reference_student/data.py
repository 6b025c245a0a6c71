"""Step `data`: read MNIST and FSDD, split them with seeds, and prove by hash that nothing leaks.

Held out are 1,000 MNIST images and recordings 0-4 of each FSDD speaker and digit. A sample
whose bytes also occur in the held-out split is dropped from training, so the two sets are
disjoint by content and not only by index.
"""

import gzip
import hashlib
import io
import tarfile
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tools.reference_student.training import arguments

MNIST_MD5 = {
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
SPLIT_SEED = 20251121
MNIST_VALIDATION, MNIST_HELD_OUT = 500, 1000
FSDD_HELD_OUT, FSDD_VALIDATION = range(0, 5), range(5, 6)
SAMPLE_RATE, SAMPLES, PEAK = 8000, 5120, 0.9
IMAGE_SIZE, IMAGE_PADDING = 32, 2
SPLITS = ("train", "validation", "held_out")


class DataError(ValueError):
    """A dataset file is not the published one; the message names the file and both hashes."""


@dataclass(frozen=True)
class Split:
    """One split: images uint8 [n, 28, 28], recordings int16 [m, 5120] (zero-padded), labels int64."""

    images: np.ndarray
    image_labels: np.ndarray
    recordings: np.ndarray
    recording_labels: np.ndarray


def _mnist_file(folder: Path, name: str) -> bytes:
    raw = (folder / "mnist" / name).read_bytes()
    found = hashlib.md5(raw).hexdigest()
    if found != MNIST_MD5[name]:
        raise DataError(
            f"{folder / 'mnist' / name}: MD5 {found}, the published file has {MNIST_MD5[name]}; download it again"
        )
    return gzip.decompress(raw)


def read_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """MNIST test set in IDX format (yann.lecun.com/exdb/mnist): images uint8 [n,28,28], labels int64 [n]."""
    images = np.frombuffer(_mnist_file(folder, "t10k-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(_mnist_file(folder, "t10k-labels-idx1-ubyte.gz"), np.uint8, offset=8).astype(np.int64)
    return images, labels


def trim_silence(samples: np.ndarray, threshold_db: float = -30.0, margin: int = 160) -> np.ndarray:
    """Cut leading and trailing 10 ms frames quieter than the loudest one by `threshold_db`; int16 in, int16 out.

    `margin` samples stay on each side so that soft consonants survive.
    """
    frame = SAMPLE_RATE // 100
    count = max(1, len(samples) // frame)
    energy = np.array([np.square(samples[i * frame : (i + 1) * frame].astype(np.float64)).mean() for i in range(count)])
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (threshold_db / 10))
    return samples[max(0, loud[0] * frame - margin) : (loud[-1] + 1) * frame + margin]


def read_fsdd(folder: Path) -> list[tuple[int, str, int, np.ndarray]]:
    """FSDD recordings as (digit, speaker, index, int16 [5120]): trimmed, cut and zero-padded at the end."""
    rows = []
    with tarfile.open(folder / "fsdd" / "recordings.tar.xz") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith(".wav"):
                continue
            digit, speaker, index = Path(member.name).stem.split("_")
            with wave.open(io.BytesIO(archive.extractfile(member).read())) as sound:
                if (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) != (SAMPLE_RATE, 2, 1):
                    raise DataError(f"{member.name}: expected 8 kHz 16-bit mono")
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
            kept = trim_silence(samples)[:SAMPLES]
            rows.append((int(digit), speaker, int(index), np.pad(kept, (0, SAMPLES - len(kept)))))
    return sorted(rows, key=lambda row: row[:3])


def content_hash(sample: np.ndarray) -> int:
    """First 8 bytes of SHA-256 over the sample's bytes, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(sample).tobytes()).digest()[:8], "big")


def _without(rows: np.ndarray, samples: np.ndarray, forbidden: set[int]) -> np.ndarray:
    """Row numbers whose content is neither forbidden nor an earlier row's content."""
    kept, seen = [], set(forbidden)
    for row in rows:
        key = content_hash(samples[row])
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return np.array(kept, np.int64)


def _disjoint(samples: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop from validation and train what a stricter split already holds."""
    forbidden: set[int] = set()
    result = {}
    for split in ("held_out", "validation", "train"):
        result[split] = _without(rows[split], samples, forbidden)
        forbidden |= {content_hash(samples[row]) for row in result[split]}
    return result


def make_splits(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of all splits (`train.images`, ...) and their content hashes (`train.image_hashes`)."""
    images, labels = read_mnist(folder)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    image_rows = _disjoint(
        images,
        {
            "held_out": order[:MNIST_HELD_OUT],
            "validation": order[MNIST_HELD_OUT : MNIST_HELD_OUT + MNIST_VALIDATION],
            "train": order[MNIST_HELD_OUT + MNIST_VALIDATION :],
        },
    )
    rows = read_fsdd(folder)
    recordings, digits = np.stack([row[3] for row in rows]), np.array([row[0] for row in rows], np.int64)
    index = np.array([row[2] for row in rows])
    held_out, validation = np.isin(index, FSDD_HELD_OUT), np.isin(index, FSDD_VALIDATION)
    sound_rows = _disjoint(
        recordings,
        {
            "held_out": np.flatnonzero(held_out),
            "validation": np.flatnonzero(validation),
            "train": np.flatnonzero(~held_out & ~validation),
        },
    )
    arrays = {}
    for split in SPLITS:
        for kind, samples, targets, chosen in (
            ("image", images, labels, image_rows[split]),
            ("recording", recordings, digits, sound_rows[split]),
        ):
            arrays[f"{split}.{kind}s"] = samples[chosen]
            arrays[f"{split}.{kind}_labels"] = targets[chosen]
            arrays[f"{split}.{kind}_hashes"] = np.array([content_hash(samples[row]) for row in chosen], np.uint64)
    return arrays


def load_split(work: Path, split: str) -> Split:
    """Read one split that step `data` wrote to `work/splits.safetensors`."""
    arrays = load_file(work / "splits.safetensors")
    return Split(*(arrays[f"{split}.{name}"] for name in ("images", "image_labels", "recordings", "recording_labels")))


def image_batch(images: np.ndarray) -> np.ndarray:
    """uint8 [n,28,28] -> float32 [n,1,32,32] in 0..1, zero-padded around the digit."""
    padded = np.pad(images, ((0, 0), (IMAGE_PADDING, IMAGE_PADDING), (IMAGE_PADDING, IMAGE_PADDING)))
    return (padded[:, None] / 255.0).astype(np.float32)


def audio_batch(recordings: np.ndarray) -> np.ndarray:
    """int16 [n,5120] -> float32 [n,1,5120] scaled so each recording's peak is 0.9."""
    wave_ = recordings.astype(np.float32) / 32768.0
    peak = np.abs(wave_).max(axis=1, keepdims=True)
    return (wave_ * (PEAK / np.maximum(peak, 1e-6)))[:, None]


def main() -> None:
    """Write `work/splits.safetensors` and refuse an overlap."""
    options = arguments(__doc__)
    arrays = make_splits(options.data)
    for kind in ("image", "recording"):
        held_out = set(arrays[f"held_out.{kind}_hashes"].tolist())
        for split in ("train", "validation"):
            overlap = held_out & set(arrays[f"{split}.{kind}_hashes"].tolist())
            if overlap:
                raise DataError(f"{len(overlap)} {kind}s of {split} are also in the held-out split")
    save_file(arrays, options.work / "splits.safetensors")
    for split in SPLITS:
        print(f"{split}: {len(arrays[f'{split}.images'])} images, {len(arrays[f'{split}.recordings'])} recordings")


if __name__ == "__main__":
    main()
