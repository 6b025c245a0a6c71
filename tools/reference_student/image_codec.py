"""Step `image_codec`: train the image discretizer, a diffusers VQModel with an 8x8 grid of 256 codes."""

from pathlib import Path

import torch
from diffusers import VQModel
from torch.nn import functional as F

from tools.reference_student import augment
from tools.reference_student.data import image_batch, load_split
from tools.reference_student.training import arguments, fit

MEAN, STD = 0.5, 0.5
GRID, CODEBOOK = 8, 256


def build() -> VQModel:
    """About 0.24 M parameters; two halvings, 32x32 -> 8x8."""
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        sample_size=32,
        num_vq_embeddings=CODEBOOK,
        vq_embed_dim=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def encode(model: VQModel, batch: torch.Tensor) -> torch.Tensor:
    """Normalised float [n,1,32,32] -> codes int64 [n,8,8]."""
    latents = model.encode(batch).latents
    return model.quantize(latents)[2][2].reshape(len(batch), GRID, GRID)


def decode(model: VQModel, codes: torch.Tensor) -> torch.Tensor:
    """Codes int64 [n,8,8] -> normalised float [n,1,32,32]."""
    latents = model.quantize.embedding(codes).permute(0, 3, 1, 2)
    return model.decode(latents, force_not_quantize=True).sample


class CodebookKeeper:
    """Restarts codes that nothing used lately at random encoder outputs, which keeps the codebook alive.

    Follows the random-restart rule of Jukebox (Dhariwal et al. 2020, section 3.1).
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight
        self.used = torch.zeros(len(weight))

    def see(self, codes: torch.Tensor) -> None:
        """Count the codes of a batch, int64 of any shape."""
        self.used += torch.bincount(codes.flatten(), minlength=len(self.weight)).float()

    @torch.no_grad()
    def restart(self, vectors: torch.Tensor, floor: float) -> int:
        """Replace codes with fewer than `floor` uses by rows of `vectors` [m, d]; returns how many."""
        dead = torch.flatten(torch.nonzero(self.used < floor))
        chosen = vectors[torch.randint(0, len(vectors), (len(dead),))]
        self.weight[dead] = chosen + torch.randn_like(chosen) * vectors.std() * 0.01
        self.used.zero_()
        return len(dead)


def train(work: Path, steps: int, batch: int, peak: float) -> VQModel:
    """Train and leave the checkpoint `work/image_codec.pt`."""
    model = build()
    model.quantize.legacy = False
    pixels = torch.from_numpy(image_batch(load_split(work, "train").images))
    keeper = CodebookKeeper(model.quantize.embedding.weight)
    latest = {}
    warmup = 300

    def loss(step: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(0, len(pixels), (batch,))
        target = (augment.images(pixels[rows]) - MEAN) / STD
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(target).latents
        latents = latents.float()
        quantized, commitment, (_, _, codes) = model.quantize(latents)
        latest["vectors"] = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        keeper.see(codes)
        # The first steps train a plain autoencoder, so that the codebook starts at useful vectors.
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decode(latents if step < warmup else quantized, force_not_quantize=True).sample
        output = output.float()
        error = F.l1_loss(output, target) + 2.0 * F.mse_loss(output, target)
        total = error + (0.0 if step < warmup else 1.0) * commitment
        return {"loss": total, "mse": F.mse_loss(output, target), "commitment": commitment}

    def after_step(step: int) -> None:
        if step == warmup:
            keeper.restart(latest["vectors"], float("inf"))
        elif step > warmup and step % 100 == 0 and step < 0.7 * steps:
            keeper.restart(latest["vectors"], 5.0)

    return fit(model, loss, work / "image_codec.pt", steps, peak, after_step=after_step)


def load(work: Path) -> VQModel:
    """The trained codec with its weights rounded to float16 (what ships), computing in float32."""
    model = build()
    state = torch.load(work / "image_codec.pt", weights_only=True)["model"]
    model.load_state_dict(
        {name: value.half().float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return model.eval()


@torch.no_grad()
def psnr(model: VQModel, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of float [n,1,32,32] pixels in 0..1 and their reconstruction."""
    output = decode(model, encode(model, (images - MEAN) / STD)) * STD + MEAN
    error = (output.clamp(0, 1) - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float((-10 * error.log10()).mean())


def main() -> None:
    """Train, then print the validation PSNR and codebook use."""
    options = arguments(
        __doc__,
        steps={"type": int, "default": 5000},
        batch={"type": int, "default": 64},
        rate={"type": float, "default": 2e-3},
    )
    train(options.work, options.steps, options.batch, options.rate)
    model = load(options.work)
    images = torch.from_numpy(image_batch(load_split(options.work, "validation").images))
    with torch.no_grad():
        used = len(torch.unique(encode(model, (images - MEAN) / STD)))
    print(f"validation PSNR {psnr(model, images):.2f} dB, {used} of {CODEBOOK} codes used")


if __name__ == "__main__":
    main()
