"""The image and audio discretizers of the tiny student, and the vocabulary they share with its decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VERSION = "1.0.0"
TEXT = 64
SPECIALS = ["<bos>", "<eos>", "<pad>", "<image>", "</image>", "<audio>", "</audio>", "<reserved>"]
IMAGE_FIRST, IMAGE_CODES, IMAGE_GRID, IMAGE_SIZE = TEXT + len(SPECIALS), 32, (4, 4), 16
AUDIO_FIRST, AUDIO_BOOKS, AUDIO_CODES, AUDIO_FRAMES = IMAGE_FIRST + IMAGE_CODES, 2, 16, 6
VOCAB = AUDIO_FIRST + AUDIO_BOOKS * AUDIO_CODES
Config = dict[str, Any]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, making the folder it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_image_discretizer(folder: Path) -> None:
    """A random VQModel: 1 channel, 16 x 16 pixels, 4 x 4 codes of 32. Uses torch's global generator."""
    from diffusers import VQModel

    model: Any = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        num_vq_embeddings=IMAGE_CODES,
        norm_num_groups=4,
        vq_embed_dim=4,
    )
    # The library starts its codebook in +-1/n, where a random encoder picks one code for everything: take latents.
    with torch.no_grad():
        latents = model.encode(torch.rand(32, 1, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1).latents.movedim(1, -1).flatten(0, 2)
        chosen = latents[torch.randperm(len(latents))[:IMAGE_CODES]]
        model.quantize.embedding.weight.copy_(chosen + 0.3 * latents.std(0) * torch.randn_like(chosen))
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    size = {"size": [IMAGE_SIZE, IMAGE_SIZE], "channels": 1, "mean": [0.5], "std": [0.5]}
    extra = {"_class_name": "VQModel", "student_version": VERSION, "preprocessing": size}
    write_json(folder / "config.json", config | extra)


def write_audio_discretizer(folder: Path, ratios: list[int], weights_file: str) -> None:
    """A random DacModel: 2 codebooks of 16, 6 frames of prod(ratios) samples. Uses torch's global generator."""
    from transformers import DacConfig, DacModel

    values: Config = {
        "encoder_hidden_size": 8,
        "downsampling_ratios": ratios,
        "decoder_hidden_size": 32,
        "n_codebooks": AUDIO_BOOKS,
        "codebook_size": AUDIO_CODES,
        "codebook_dim": 4,
        "sampling_rate": 8000,
    }
    model: Any = DacModel(DacConfig(**values))
    # Random weights decode to near silence, which the runtime refuses: bring the sound to a hearable level.
    with torch.no_grad():
        codes = torch.randint(AUDIO_CODES, (4, AUDIO_BOOKS, AUDIO_FRAMES))
        model.decoder.conv2.bias.zero_()
        model.decoder.conv2.weight *= 0.2 / model.decode(audio_codes=codes).audio_values.std()
    folder.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if weights_file.endswith(".pth"):
        torch.save(state, folder / weights_file)
    else:
        save_file(state, folder / weights_file)
    hop = int(torch.tensor(ratios).prod())
    size = {"sample_rate": 8000, "samples": AUDIO_FRAMES * hop, "channels": 1, "peak": 0.9}
    extra = {"model_type": "dac", "student_version": VERSION, "preprocessing": size}
    write_json(folder / "config.json", values | extra)
