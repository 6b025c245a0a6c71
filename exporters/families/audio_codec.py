"""transformers' DacModel as ``audio_encoder`` (waveform to codes) and ``audio_decoder`` (codes to waveform)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import DacModel
from transformers.models.dac.modeling_dac import Snake1d

from exporters import ops
from exporters.families.folding import assert_equal, folded_table
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec

#: How far the fused decoder may be from the module's own, relative to its largest value: float32 rounding.
FOLD_TOLERANCE = 1e-5


class FusedSnake(nn.Module):
    """Snake with its reciprocal computed once, in float64."""

    def __init__(self, snake: Snake1d):
        super().__init__()
        alpha = snake.alpha.detach()
        self.register_buffer("alpha", alpha.clone())
        self.register_buffer("inverse", (1 / (alpha.double() + 1e-9)).to(alpha.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.snake(x, self.alpha, self.inverse)


class AudioDecoder(nn.Module):
    """``forward(codes int32 [1, K, T]) -> audio [1, 1, T*hop]``."""

    def __init__(self, model: DacModel):
        super().__init__()
        self.decoder, self.size = with_fused_snake(model.decoder), model.config.codebook_size
        tables = [
            folded_table(q.codebook.weight, q.out_proj.weight, q.out_proj.bias) for q in model.quantizer.quantizers
        ]
        self.register_buffer("tables", torch.cat(tables))

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(ops.codebook_lookup(codes, self.tables, self.size))


class AudioEncoder(nn.Module):
    """``forward(audio [1, 1, L]) -> codes int32 [1, K, T]``; L is a multiple of the hop length."""

    def __init__(self, model: DacModel):
        super().__init__()
        self.encoder, self.quantizer = with_fused_snake(model.encoder), model.quantizer

    def forward(self, audio: Tensor) -> Tensor:
        return self.quantizer(self.encoder(audio))[1].to(torch.int32)


def with_fused_snake(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose Snake activations are fused ones."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Snake1d):
                setattr(parent, name, FusedSnake(child))
    return module


def reference_decode(model: DacModel, codes: Tensor) -> Tensor:
    """The library's own way from codes to the waveform: the parity reference."""
    return model.decode(audio_codes=codes.long(), return_dict=False)[0][:, None]


def reference_encode(model: DacModel, audio: Tensor) -> Tensor:
    """The library's own way from the waveform to codes."""
    return model.encode(audio).audio_codes.to(torch.int32)


def capture_audio(model: DacModel, frames: int) -> tuple[Program, Program]:
    """Captures (decoder, encoder), both with a dynamic number of frames."""
    codebooks, hop = model.config.n_codebooks, model.config.hop_length
    decoder, encoder = AudioDecoder(model).eval(), AudioEncoder(model).eval()
    codes = (
        torch.arange(codebooks * frames, dtype=torch.int32).reshape(1, codebooks, frames) % model.config.codebook_size
    )
    audio = 0.3 * torch.sin(torch.arange(frames * hop) * 0.05)[None, None]
    with torch.no_grad():
        assert_equal("audio_decoder", decoder(codes), reference_decode(model, codes), FOLD_TOLERANCE)
    decoding = capture(
        "audio_decoder",
        decoder,
        (codes,),
        {"codes": {2: "T"}},
        outputs=(TensorSpec("audio", "float32", (1, 1, "L")),),
        names=("codes",),
    )
    encoding = capture(
        "audio_encoder",
        encoder,
        (audio,),
        {"audio": {2: "L"}},
        outputs=(TensorSpec("codes", "int32", (1, codebooks, "T")),),
        names=("audio",),
    )
    return decoding, encoding
