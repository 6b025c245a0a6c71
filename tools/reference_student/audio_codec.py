"""Step `audio_codec`: train the audio discretizer, a transformers DacModel at 8 kHz with 20 frames of 4 codes.

The loss is the multi-scale log-mel distance of DAC (Kumar et al. 2023, arXiv:2306.06546) plus a
waveform term; no adversary, which two cores could not train in the time.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DacConfig, DacModel

from tools.reference_student import augment
from tools.reference_student.data import SAMPLE_RATE, audio_batch, load_split
from tools.reference_student.image_codec import CodebookKeeper
from tools.reference_student.spectrum import log_mel
from tools.reference_student.training import arguments, fit

CODEBOOKS, CODEBOOK, FRAMES, HOP = 4, 256, 20, 256
CROP = 2048
SCALES = ((64, 8), (128, 20), (256, 40), (512, 64), (1024, 80))


def build() -> DacModel:
    """About 0.62 M parameters, hop 256 samples (32 ms)."""
    config = DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[4, 4, 4, 4],
        decoder_hidden_size=128,
        n_codebooks=CODEBOOKS,
        codebook_size=CODEBOOK,
        codebook_dim=8,
        sampling_rate=SAMPLE_RATE,
    )
    model = DacModel(config)
    # The library's 0.02 suits hundreds of channels; with a dozen the signal would die out, so each
    # convolution keeps its input's variance (a transposed one sums two taps of every channel).
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=(0.7 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, nn.ConvTranspose1d):
            nn.init.normal_(module.weight, std=(0.5 / module.in_channels) ** 0.5)
            nn.init.zeros_(module.bias)
    # A quiet start keeps the final tanh out of saturation, where it has no gradient.
    with torch.no_grad():
        model.decoder.conv2.weight.mul_(0.1)
    return model


def encode(model: DacModel, sound: torch.Tensor) -> torch.Tensor:
    """float [n,1,5120] -> codes int64 [n,4,20]."""
    return model.encode(sound).audio_codes


def decode(model: DacModel, codes: torch.Tensor) -> torch.Tensor:
    """Codes int64 [n,4,20] -> float [n,5120]."""
    return model.decode(audio_codes=codes).audio_values


def crops(sounds: torch.Tensor, count: int) -> torch.Tensor:
    """Random windows float [count,1,2048] of float [n,1,5120], mostly from where there is speech.

    The codec is convolutional, so it learns from windows; half of a padded recording is silence.
    """
    whole = augment.sounds(sounds[torch.randint(0, len(sounds), (count,))])
    energy = F.avg_pool1d(whole.square(), CROP, stride=256)[:, 0]
    start = 256 * torch.multinomial(energy + 0.05 * energy.amax(1, keepdim=True), 1)
    return whole[:, 0].gather(1, start + torch.arange(CROP))[:, None]


def loudness_distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean L1 distance of mel magnitudes, which the loud formants decide; float [n,L] each."""
    return sum(
        F.l1_loss(
            log_mel(output, window, window // 4, bands, 1e-5).exp(),
            log_mel(target, window, window // 4, bands, 1e-5).exp(),
        )
        for window, bands in SCALES
    ) / len(SCALES)


def spectral_distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean L1 distance of log-mel spectrograms over five window lengths; float [n,L] each."""
    return sum(
        F.l1_loss(log_mel(output, window, window // 4, bands, 2e-3), log_mel(target, window, window // 4, bands, 2e-3))
        for window, bands in SCALES
    ) / len(SCALES)


def train(work: Path, steps: int, batch: int, peak: float, compiled: bool) -> DacModel:
    """Train and leave the checkpoint `work/audio_codec.pt`."""
    model = build()
    sounds = torch.from_numpy(audio_batch(load_split(work, "train").recordings))
    quantizers = model.quantizer.quantizers
    keepers = [CodebookKeeper(quantizer.codebook.weight) for quantizer in quantizers]
    latest = {}

    # In float32: with bfloat16 convolutions this model was seen to diverge into a saturated output.
    def reconstruct(target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized, codes, latents, commitment, codebook = model.quantizer(model.encoder(target))
        return model.decoder(quantized)[:, 0], codes, latents, 0.25 * commitment.mean() + codebook.mean()

    run = torch.compile(reconstruct) if compiled else reconstruct

    def loss(step: int) -> dict[str, torch.Tensor]:
        target = crops(sounds, batch)
        output, codes, latents, commitment = run(target)
        latest["vectors"] = latents.detach()
        for index, keeper in enumerate(keepers):
            keeper.see(codes[:, index])
        spectral = spectral_distance(output, target[:, 0])
        wave = F.l1_loss(output, target[:, 0])
        loud = loudness_distance(output, target[:, 0])
        return {
            "loss": 2.0 * spectral + 20.0 * loud + wave + commitment,
            "spectral": spectral,
            "loud": loud,
            "commitment": commitment,
        }

    def after_step(step: int) -> None:
        interval = 25 if step < 500 else 100
        if step % interval == 0 and step < 0.7 * steps:
            for index, keeper in enumerate(keepers):
                vectors = latest["vectors"][:, index * 8 : (index + 1) * 8].transpose(1, 2).reshape(-1, 8)
                keeper.restart(vectors, interval * batch * (CROP // HOP) / CODEBOOK * 0.05)

    return fit(
        model, loss, work / "audio_codec.pt", steps, peak, after_step=after_step, report_every=100, save_every=250
    )


def load(work: Path) -> DacModel:
    """The trained codec with its weights rounded to float16 (what ships), computing in float32."""
    model = build()
    state = torch.load(work / "audio_codec.pt", weights_only=True)["model"]
    model.load_state_dict({name: value.half().float() for name, value in state.items()})
    return model.eval()


@torch.no_grad()
def si_snr(model: DacModel, sounds: torch.Tensor) -> float:
    """Mean scale-invariant SNR in dB of float [n,1,L] and its reconstruction (Le Roux et al. 2019)."""
    output, target = decode(model, encode(model, sounds)), sounds[:, 0]
    projection = (output * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True) * target
    ratio = projection.square().sum(-1) / (output - projection).square().sum(-1)
    return float((10 * ratio.log10()).mean())


def main() -> None:
    """Train, then print validation figures and codebook use."""
    options = arguments(
        __doc__,
        steps={"type": int, "default": 6000},
        batch={"type": int, "default": 16},
        rate={"type": float, "default": 1.5e-3},
        eager={"action": "store_true", "help": "do not compile (no C++ compiler needed, slower)"},
    )
    train(options.work, options.steps, options.batch, options.rate, not options.eager)
    model = load(options.work)
    sounds = torch.from_numpy(audio_batch(load_split(options.work, "validation").recordings))
    with torch.no_grad():
        codes = encode(model, sounds)
        distance = float(spectral_distance(decode(model, codes), sounds[:, 0]))
    used = [len(torch.unique(codes[:, index])) for index in range(CODEBOOKS)]
    print(f"validation SI-SNR {si_snr(model, sounds):.2f} dB, log-mel distance {distance:.3f}, codes used {used}")


if __name__ == "__main__":
    main()
