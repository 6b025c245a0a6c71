"""transformers' DacModel as ``audio_encoder`` (waveform to codes) and ``audio_decoder`` (codes to waveform)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exporters import ops
from exporters.families.folding import assert_equal, folded_table
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec

if TYPE_CHECKING:  # a package without it does not pay for loading its library
    from transformers import DacModel

#: What the library adds to alpha before it divides by it.
SNAKE_EPSILON = 1e-9
#: How far the fused decoder may be from the module's own, relative to its largest value: float32 rounding.
FOLD_TOLERANCE = 1e-5


class FusedSnake(nn.Module):
    """Snake between a scaling in front (None where the layer before has it in its weights) and one behind."""

    def __init__(self, alpha: Tensor | None):
        super().__init__()
        self.register_buffer("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        return ops.snake(x if self.alpha is None else x * self.alpha)


class AudioDecoder(nn.Module):
    """``forward(codes int32 [1, K, T]) -> audio [1, 1, T*hop]``."""

    def __init__(self, model: DacModel):
        super().__init__()
        self.decoder, self.size = with_folded_snake(model.decoder), model.config.codebook_size
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
        self.encoder, self.quantizer = with_folded_snake(model.encoder), model.quantizer

    def forward(self, audio: Tensor) -> Tensor:
        return self.quantizer(self.encoder(audio))[1].to(torch.int32)


#: class of the library -> for each of its Snakes: (the Snake, the convolution whose output it alone reads, or None,
#: the convolution that alone reads it).
SNAKES: Mapping[str, tuple[tuple[str, str | None, str], ...]] = {
    "DacResidualUnit": (("snake1", None, "conv1"), ("snake2", "conv1", "conv2")),
    "DacEncoderBlock": (("snake1", None, "conv1"),),
    "DacDecoderBlock": (("snake1", None, "conv_t1"),),
    "DacEncoder": (("snake1", None, "conv2"),),
    "DacDecoder": (("snake1", None, "conv2"),),
}


def with_folded_snake(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose Snakes hand their scalings to the convolutions around them, in float64, rounded once.

    snake(x) = (z + sin(z)^2) / alpha with z = alpha * x: dividing by alpha scales the input channels of the
    convolution behind; multiplying by it scales the output channels of the one in front, where nothing else reads that.
    """
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, before, behind in SNAKES.get(type(parent).__name__, ()):
            alpha = getattr(parent, name).alpha.detach().double().reshape(-1)
            alpha = torch.where(alpha < 0, alpha - SNAKE_EPSILON, alpha + SNAKE_EPSILON)
            _scale_inputs(getattr(parent, behind), 1 / alpha)
            if before is not None:
                _scale_outputs(getattr(parent, before), alpha)
            setattr(parent, name, FusedSnake(None if before else alpha.float()[None, :, None]))
    return module


def _scale_inputs(conv: nn.Module, factor: Tensor) -> None:
    """Scales the weights of each input channel; a transposed convolution has them on its first axis."""
    shape = (-1, 1, 1) if isinstance(conv, nn.ConvTranspose1d) else (1, -1, 1)
    conv.weight.data = (conv.weight.data.double() * factor.reshape(shape)).to(conv.weight.dtype)


def _scale_outputs(conv: nn.Conv1d, factor: Tensor) -> None:
    """Scales weights and bias of each output channel."""
    conv.weight.data = (conv.weight.data.double() * factor[:, None, None]).to(conv.weight.dtype)
    if conv.bias is not None:
        conv.bias.data = (conv.bias.data.double() * factor).to(conv.bias.dtype)


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
        # Latents, not codes: a code may flip where two entries are equally near.
        assert_equal("audio_encoder", encoder.encoder(audio), model.encoder(audio), FOLD_TOLERANCE)
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
