"""Small folders and profiles for tests of the build: a build of them takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from device_profiles import Profile, load_profile

CONTEXT = 96


def write_plain(folder: Path, **options: Any) -> Path:
    """A random one-layer Llama as transformers saves it, without a tokenizer."""
    sizes = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(sizes | dict(initializer_range=0.3) | options))).save_pretrained(folder)
    return folder


def text_only(package: Path, folder: Path, sharpness: float = 1.0, tokenizer: bool = True) -> Path:
    """The decoder of a delivery package as a plain checkpoint folder; ``sharpness`` multiplies its logits."""
    folder.mkdir()
    tokenizers = [package / "tokenizer" / "tokenizer.json"] if tokenizer else []
    for path in (package / "config.json", *tokenizers, *package.glob("model*")):
        (folder / path.name).write_bytes(path.read_bytes())
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] *= sharpness
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def one_form(**changes: Any) -> Profile:
    """This machine, with one artifact to make."""
    return replace(load_profile("host"), components={"lm": ("onnx/fused/exact",)}, **changes)


def hidden(folder: Path) -> list[str]:
    """What builders leave beside an output while they work."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))
