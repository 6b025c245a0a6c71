"""Step `tokens`: encode every split with the frozen discretizers; training data in many augmented versions."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.reference_student import audio_codec, augment, image_codec
from tools.reference_student.data import audio_batch, image_batch, load_split
from tools.reference_student.training import SEED, arguments

# Mild versions are what generation learns to make; strong ones are only read.
VERSIONS = {"plain": (0.0, 1), "mild": (0.5, 8), "strong": (1.0, 24)}


@torch.no_grad()
def encode_images(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """float [n,1,32,32] in 0..1 -> codes int16 [n,64], row-major."""
    parts = [image_codec.encode(model, (part - image_codec.MEAN) / image_codec.STD) for part in pixels.split(256)]
    return torch.cat(parts).flatten(1).to(torch.int16)


@torch.no_grad()
def encode_sounds(model: torch.nn.Module, sounds: torch.Tensor) -> torch.Tensor:
    """float [n,1,5120] -> codes int16 [n,80]: frame by frame, the four codebooks of a frame side by side."""
    parts = [audio_codec.encode(model, part) for part in sounds.split(64)]
    return torch.cat(parts).transpose(1, 2).flatten(1).to(torch.int16)


def main() -> None:
    """Write `work/tokens.safetensors`: `{split}.{kind}.{version}` int16 [versions, n, length] and the labels."""
    options = arguments(__doc__)
    arrays = {}
    for kind, codec, encode, distort in (
        ("image", image_codec, encode_images, augment.images),
        ("audio", audio_codec, encode_sounds, augment.sounds),
    ):
        model = codec.load(options.work)
        for split in ("train", "validation", "held_out"):
            data = load_split(options.work, split)
            samples = torch.from_numpy(image_batch(data.images) if kind == "image" else audio_batch(data.recordings))
            labels = data.image_labels if kind == "image" else data.recording_labels
            arrays[f"{split}.{kind}.labels"] = torch.from_numpy(labels)
            for name, (strength, count) in VERSIONS.items():
                if split != "train" and name != "plain":
                    continue
                torch.manual_seed(SEED)
                versions = [encode(model, distort(samples, strength) if strength else samples) for _ in range(count)]
                arrays[f"{split}.{kind}.{name}"] = torch.stack(versions)
            print(kind, split, {name: tuple(value.shape) for name, value in arrays.items() if name.startswith(f"{split}.{kind}")}, flush=True)
    save_file(arrays, options.work / "tokens.safetensors")


def load(work: Path) -> dict[str, torch.Tensor]:
    """The arrays that this step wrote."""
    return load_file(work / "tokens.safetensors")


if __name__ == "__main__":
    main()
