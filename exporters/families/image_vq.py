"""diffusers' VQModel as ``image_encoder`` (image to codes) and ``image_decoder`` (codes to image)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exporters import ops
from exporters.families.folding import assert_equal, folded_table
from exporters.program import Program, capture
from runtimes.bundle import TensorSpec

if TYPE_CHECKING:  # a package without it does not pay for loading its library
    from diffusers import VQModel

#: How far the folded lookup may be from the module's own, relative to its largest value: float32 rounding.
FOLD_TOLERANCE = 1e-5


class ImageDecoder(nn.Module):
    """``forward(codes int32 [B, h, w]) -> image [B, C, H, W]``, normalised as the encoder's input."""

    def __init__(self, model: VQModel):
        super().__init__()
        self.decoder, self.size = model.decoder, model.quantize.n_e
        table = folded_table(model.quantize.embedding.weight, model.post_quant_conv.weight, model.post_quant_conv.bias)
        self.register_buffer("table", table)

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(ops.codebook_lookup(codes[:, None], self.table, self.size))


class ImageEncoder(nn.Module):
    """``forward(image [B, C, H, W]) -> codes int32 [B, h, w]``: the nearest entry of the codebook.

    The search is the library's own formula, without the view that it takes of a tensor whose layout in memory is the
    backend's business.
    """

    def __init__(self, model: VQModel):
        super().__init__()
        self.encoder, self.quant_conv, self.codebook = model.encoder, model.quant_conv, model.quantize.embedding

    def forward(self, image: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(image))
        batch, width, rows, columns = latents.shape
        points = latents.movedim(1, -1).reshape(-1, width)
        codes = torch.argmin(torch.cdist(points, self.codebook.weight), 1)
        return codes.reshape(batch, rows, columns).to(torch.int32)


def reference_decode(model: VQModel, codes: Tensor) -> Tensor:
    """The library's own way from codes to the image: the parity reference."""
    shape = (*codes.shape, model.quantize.vq_embed_dim)
    latents = model.quantize.get_codebook_entry(codes.reshape(-1).long(), shape)
    return model.decode(latents, force_not_quantize=True, return_dict=False)[0]


def reference_encode(model: VQModel, image: Tensor) -> Tensor:
    """The library's own way from the image to codes int32 [B, h, w]."""
    latents = model.encode(image, return_dict=False)[0]
    _, _, (_, _, codes) = model.quantize(latents)
    return codes.reshape(latents.shape[0], *latents.shape[2:]).to(torch.int32)


def capture_image(model: VQModel, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Program, Program]:
    """Captures (decoder, encoder), both with a dynamic batch.

    Args:
        grid: codes per image (rows, columns).
        size: pixels per image (height, width).
    """
    decoder = ImageDecoder(model).eval()
    codes = torch.arange(2 * grid[0] * grid[1], dtype=torch.int32).reshape(2, *grid) % model.quantize.n_e
    with torch.no_grad():
        assert_equal("image_decoder", decoder(codes), reference_decode(model, codes), FOLD_TOLERANCE)
    channels_out, channels_in = model.config.out_channels, model.config.in_channels
    decoding = capture(
        "image_decoder",
        decoder,
        (codes,),
        {"codes": {0: "B"}},
        outputs=(TensorSpec("image", "float32", ("B", channels_out, *size)),),
        names=("codes",),
    )
    encoder = ImageEncoder(model).eval()
    image = torch.rand(2, channels_in, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert_equal("image_encoder", encoder(image), reference_encode(model, image), 0.0)
    encoding = capture(
        "image_encoder",
        encoder,
        (image,),
        {"image": {0: "B"}},
        outputs=(TensorSpec("codes", "int32", ("B", *grid)),),
        names=("image",),
    )
    return decoding, encoding
