"""Shared by the tests of quantisation: a linear layer's data, and a student as transformers' own model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.families.decoder_lm import build_reference
from exporters.student import Student, load_student

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def correlated(tokens: int = 512, columns: int = 64, rows: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [N,K], inputs [tokens, K] that are correlated, as activations are)."""
    torch.manual_seed(3)
    inputs = torch.randn(tokens, columns) @ torch.randn(columns, columns) * 0.2
    return torch.randn(rows, columns) * 0.1, inputs


def library_student(folder: Path, kind: str, **options: object) -> Student:
    """A random float student of a family, written by transformers itself; norms are away from one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | options))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.2)
        if parameter.dim() == 1 and not kind.startswith("gemma"):
            parameter.data += 1
    model.save_pretrained(folder)
    return load_student(folder)


@torch.no_grad()
def eager_logits(student: Student, ids: torch.Tensor) -> torch.Tensor:
    return build_reference(student)(ids, use_cache=False).logits
