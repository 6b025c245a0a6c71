"""A seeded, random, tiny delivery package: the real formats at a size every test can afford (about 300 kB).

    python -m tools.tiny_student FOLDER [--variant int4] [--model-type llama] [--seed 0]

It has all of what a delivery package may hold: sharded safetensors, a real byte-level BPE tokenizer, an image and an
audio discretizer with encoders and decoders, quantised weights written by the compressed-tensors library itself.
Vocabulary: text [0, 64), specials [64, 72), image [72, 104), audio [104, 136) in two codebooks of 16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from exporters.package import write_manifest
from tools.tiny_discretizers import (
    AUDIO_BOOKS,
    AUDIO_CODES,
    AUDIO_FIRST,
    AUDIO_FRAMES,
    IMAGE_CODES,
    IMAGE_FIRST,
    IMAGE_GRID,
    IMAGE_SIZE,
    SPECIALS,
    TEXT,
    VERSION,
    VOCAB,
    write_audio_discretizer,
    write_image_discretizer,
    write_json,
)

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

Config = dict[str, Any]


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [f"{start} {digit}" for digit in DIGITS for start in ("a handwritten", "say")]
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789"), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 256,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "student_version": VERSION,
        },
    )
    write_json(folder / "special_tokens_map.json", {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    write_json(folder / "added_tokens.json", {token: TEXT + index for index, token in enumerate(SPECIALS)})
    return tokenizer


def _decoder_config(model_type: str, head_dim: int) -> Config:
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]],
        "model_type": model_type,
        "student_version": VERSION,
        "dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": TEXT,
        "eos_token_id": TEXT + 1,
        "pad_token_id": TEXT + 2,
    }


def _decoder_weights(config: Config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    from exporters.model_config import skeleton

    weights = {}
    for name, shape in skeleton(config).parameters.items():
        noise = torch.randn(shape, generator=generator)
        # Norm weights near one; matrices large enough that the logits tell tokens apart.
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (1.5 / shape[1] ** 0.5)
    return weights


def _weights_args(bits: int, symmetric: bool, group: int | None) -> Config:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }


def quantization_config(variant: str) -> Config | None:
    """The quantization_config of a variant: "float" (None), "int8" or "int4" (embedding and tied head at 8 bit)."""
    if variant == "float":
        return None
    eight = {"targets": ["Embedding"], "weights": _weights_args(8, True, None), "format": "int-quantized"}
    if variant == "int8":
        groups = {"group_0": eight | {"targets": ["Linear", "Embedding"]}}
    elif variant == "int4":
        four = {"targets": ["Linear"], "weights": _weights_args(4, False, 32), "format": "pack-quantized"}
        groups = {"group_0": four, "group_1": eight}
    else:
        raise ValueError(f"unknown variant {variant!r}: float, int8 or int4")
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(groups) > 1 else eight["format"],
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def compress(weight: torch.Tensor, group_config: Config, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round-to-nearest quantisation of a weight [N, K], stored by the compressed-tensors library.

    Args:
        group_config: one entry of config_groups, with its "format".

    Returns:
        local tensor names ("weight_packed", "weight_scale", ...) -> tensors.
    """
    scheme = QuantizationScheme.model_validate(group_config)
    args = scheme.weights
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, args.group_size or columns)
    low, high = -(1 << (args.num_bits - 1)), (1 << (args.num_bits - 1)) - 1
    if args.symmetric:
        scale = (grouped.abs().amax(-1) / high).to(scale_dtype)
        zero = torch.zeros_like(scale, dtype=torch.int8)
    else:
        floor, ceiling = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((ceiling - floor) / (high - low)).to(scale_dtype)
        zero = (low - floor / scale.float()).round().clamp(low, high).to(torch.int8)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = BaseCompressor.get_value_from_registry(group_config["format"]).compress(state, scheme)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _store_decoder(folder: Path, config: Config, weights: dict[str, torch.Tensor], scale_dtype: torch.dtype) -> None:
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    by_class = {target: group for group in groups for target in group["targets"]}
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        kind = "Embedding" if "embed_tokens" in name else "Linear" if weight.ndim == 2 else ""
        if kind in by_class:
            module = name.removesuffix(".weight")
            parts = compress(weight, by_class[kind], scale_dtype)
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        else:
            stored[name] = weight
    # Two shards, split by layer, as the big checkpoints are.
    placed = {name: f"model-0000{2 if '.layers.1.' in name else 1}-of-00002.safetensors" for name in stored}
    for shard in sorted(set(placed.values())):
        here = {name: tensor for name, tensor in stored.items() if placed[name] == shard}
        save_file(here, folder / shard, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in stored.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))},
    )
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": TEXT, "eos_token_id": [TEXT + 1], "pad_token_id": TEXT + 2, "do_sample": False},
    )


def _signals(folder: Path, samples: int, generator: torch.Generator) -> None:
    """images.safetensors: images uint8 [n, H, W]; audio.safetensors: recordings int16 [n, samples]."""
    images = torch.randint(256, (4, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    save_file({"images": images}, folder / "images.safetensors")
    recordings = torch.randint(-(1 << 14), 1 << 14, (4, samples), generator=generator, dtype=torch.int16)
    save_file({"recordings": recordings}, folder / "audio.safetensors")


def _samples(folder: Path, tokenizer: Tokenizer, generator: torch.Generator) -> None:
    """lm.safetensors: ids int32 [n, L] padded at the end with <pad>, length int32 [n], prompt int32 [n]."""
    rows, prompts = [], []
    for index, digit in enumerate(DIGITS):
        image = index % 2 == 0
        text = tokenizer.encode(f"{'a handwritten' if image else 'say'} {digit}").ids
        if image:
            codes = IMAGE_FIRST + torch.randint(IMAGE_CODES, (16,), generator=generator)
        else:
            book = torch.arange(AUDIO_BOOKS) * AUDIO_CODES
            frames = torch.randint(AUDIO_CODES, (AUDIO_FRAMES, AUDIO_BOOKS), generator=generator)
            codes = AUDIO_FIRST + (frames + book).flatten()
        begin = TEXT + SPECIALS.index("<image>" if image else "<audio>")
        prompt = [TEXT, *text, begin]
        rows.append([*prompt, *codes.tolist(), begin + 1, TEXT + 1])
        prompts.append(len(prompt))
    longest = max(map(len, rows))
    padded = [row + [TEXT + 2] * (longest - len(row)) for row in rows]
    folder.mkdir(parents=True)
    texts = ["a handwritten seven", "say three", "zero 0 nine"]
    cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts]
    write_json(folder / "tokenizer_golden.json", {"cases": cases})
    values = {"ids": padded, "length": [len(row) for row in rows], "prompt": prompts}
    save_file(
        {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()},
        folder / "lm.safetensors",
    )


def modality_table() -> dict[str, Config]:
    """The modality rows of package.json."""
    image = {
        "tokens": [IMAGE_FIRST, AUDIO_FIRST],
        "codebooks": 1,
        "codebook_size": IMAGE_CODES,
        "grid": list(IMAGE_GRID),
        "begin": "<image>",
        "end": "</image>",
        "discretizer": "discretizers/image",
    }
    audio = {
        "tokens": [AUDIO_FIRST, VOCAB],
        "codebooks": AUDIO_BOOKS,
        "codebook_size": AUDIO_CODES,
        "grid": [AUDIO_FRAMES, AUDIO_BOOKS],
        "begin": "<audio>",
        "end": "</audio>",
        "discretizer": "discretizers/audio",
    }
    return {"text": {"tokens": [0, TEXT]}, "image": image, "audio": audio}


def write_tiny_student(
    folder: str | Path,
    variant: str = "int4",
    model_type: str = "llama",
    seed: int = 0,
    *,
    head_dim: int = 16,
    hop: tuple[int, ...] = (4, 4),
    audio_weights: str = "model.safetensors",
    scale_dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a tiny delivery package into `folder` (new or empty) and return it.

    Args:
        variant: "float", "int8" (per channel) or "int4" (groups of 32, asymmetric; embedding int8, head tied to it).
        model_type: "llama" or "qwen3".
        head_dim: width of an attention head.
        hop: downsampling ratios of the audio codec; their product is the hop length.
        audio_weights: "model.safetensors" or "model.pth".
        scale_dtype: stored dtype of the scales.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = _tokenizer(folder / "tokenizer")
    config = _decoder_config(model_type, head_dim)
    weights = _decoder_weights(config, generator)
    if (quantization := quantization_config(variant)) is not None:
        config["quantization_config"] = quantization
    _store_decoder(folder, config, weights, scale_dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        write_image_discretizer(folder / "discretizers" / "image")
        write_audio_discretizer(folder / "discretizers" / "audio", list(hop), audio_weights)
    _samples(folder / "samples", tokenizer, generator)
    _signals(folder / "samples", AUDIO_FRAMES * math.prod(hop), generator)
    (folder / "MODEL_CARD.md").write_text("# Tiny student\n\nRandom weights, for tests.\n", encoding="utf-8")
    (folder / "DATA_CARD.md").write_text("# Data\n\nNone: the weights are random.\n", encoding="utf-8")
    write_manifest(folder, f"tiny-{model_type}-{variant}", VERSION, "Apache-2.0", modality_table())
    return folder


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a tiny random delivery package.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=("float", "int8", "int4"), default="int4")
    parser.add_argument("--model-type", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_tiny_student(args.folder, args.variant, args.model_type, args.seed))


if __name__ == "__main__":
    main()
