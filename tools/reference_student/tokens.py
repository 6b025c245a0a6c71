"""Step `tokens`: encode every split with the frozen discretizers; training data in many augmented versions."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.reference_student import audio_codec, augment, image_codec
from tools.reference_student.data import audio_batch, image_batch, load_split
from tools.reference_student.training import SEED, arguments

# Mild versions are what generation learns to make; strong ones are only read.
VERSIONS = {
    "image": {"plain": (0.0, 1), "mild": (0.5, 8), "strong": (1.0, 20)},
    "audio": {"plain": (0.0, 1), "mild": (0.5, 2), "strong": (1.0, 4)},
}


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


def encode_all(work: Path, kind: str) -> dict[str, torch.Tensor]:
    """`{split}.{version}` int16 [versions, n, length] and `{split}.labels` of one modality."""
    encode, distort = MODALITIES[kind]
    # The codes do not depend on the audio codec's last stage, which may still be training.
    model = audio_codec.load(work, "features") if kind == "audio" else image_codec.load(work)
    arrays = {}
    for split in ("train", "validation", "held_out"):
        data = load_split(work, split)
        samples = torch.from_numpy(image_batch(data.images) if kind == "image" else audio_batch(data.recordings))
        arrays[f"{split}.labels"] = torch.from_numpy(data.image_labels if kind == "image" else data.recording_labels)
        for name, (strength, count) in VERSIONS[kind].items():
            if split == "train" or name == "plain":
                torch.manual_seed(SEED)
                arrays[f"{split}.{name}"] = torch.stack(
                    [encode(model, distort(samples, strength) if strength else samples) for _ in range(count)]
                )
    return arrays


MODALITIES = {
    "image": (encode_images, augment.images),
    "audio": (encode_sounds, augment.sounds),
}


def main() -> None:
    """Write `work/tokens_{image,audio}.safetensors`."""
    options = arguments(__doc__, modality={"choices": tuple(MODALITIES), "nargs": "+", "default": list(MODALITIES)})
    for kind in options.modality:
        arrays = encode_all(options.work, kind)
        save_file(arrays, options.work / f"tokens_{kind}.safetensors")
        print(kind, {name: tuple(value.shape) for name, value in arrays.items()}, flush=True)


def load(work: Path) -> dict[str, torch.Tensor]:
    """The arrays of the modalities encoded so far, as `{split}.{kind}.{version}` and `{split}.{kind}.labels`."""
    arrays = {}
    for kind in MODALITIES:
        path = work / f"tokens_{kind}.safetensors"
        for name, value in (load_file(path) if path.exists() else {}).items():
            split, _, version = name.partition(".")
            arrays[f"{split}.{kind}.{version}"] = value
    return arrays


if __name__ == "__main__":
    main()
