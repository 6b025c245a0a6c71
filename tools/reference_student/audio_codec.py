"""Step `audio_codec`: train the audio discretizer, a transformers DacModel at 8 kHz with 20 frames of 4 codes.

The loss is the multi-scale log-mel distance of DAC (Kumar et al. 2023, arXiv:2306.06546) plus a
waveform term; no adversary, which two cores could not train in the time. A second stage adds the
features of a digit classifier (step `critic`), without which the words stay hard to tell apart.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DacConfig, DacModel

from tools.reference_student import augment, critic
from tools.reference_student.data import SAMPLE_RATE, audio_batch, load_split
from tools.reference_student.image_codec import CodebookKeeper
from tools.reference_student.spectrum import log_mel
from tools.reference_student.training import arguments, fit

CODEBOOKS, CODEBOOK, FRAMES, HOP = 4, 256, 20, 256
CHECKPOINTS = {
    "spectra": "audio_codec_spectra.pt",
    "features": "audio_codec_features.pt",
    "decoder": "audio_codec.pt",
}
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
    # The library's 0.02 suits hundreds of channels; with a dozen the signal would die out.
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=(0.7 / module.weight[0].numel()) ** 0.5)
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


class MovingCodebook:
    """Keeps a codebook at the moving average of the vectors that choose each code, and reseeds unused codes.

    The VQ-VAE update (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1): a gradient step of
    the usual size follows the moving latents too slowly for a short training.
    """

    def __init__(self, weight: nn.Parameter, decay: float = 0.97) -> None:
        self.weight, self.decay = weight, decay
        self.counts, self.sums = torch.ones(len(weight)), weight.detach().clone()

    @torch.no_grad()
    def see(self, codes: torch.Tensor, vectors: torch.Tensor) -> None:
        """Move towards vectors float [m,d], whose codes are int64 [m]."""
        counts = torch.bincount(codes, minlength=len(self.weight)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-4)[:, None])

    @torch.no_grad()
    def reseed(self, vectors: torch.Tensor, floor: float) -> None:
        """Put codes whose average use is below `floor` vectors a step at random rows of vectors [m,d]."""
        dead = torch.nonzero(self.counts < floor).flatten()
        chosen = vectors[torch.randint(0, len(vectors), (len(dead),))]
        self.weight[dead] = chosen
        self.sums[dead], self.counts[dead] = chosen * 4 * floor, torch.full((len(dead),), 4 * floor)


def train_spectra(work: Path, steps: int, batch: int, peak: float, compiled: bool) -> DacModel:
    """Stage 1, the published recipe: log-mel spectra, codebooks by gradient; leaves `work/audio_codec_spectra.pt`.

    In float32: bfloat16 convolutions of these narrow layers gave wrong results on the processor used.
    """
    model = build()
    sounds = torch.from_numpy(audio_batch(load_split(work, "train").recordings))
    keepers = [CodebookKeeper(quantizer.codebook.weight) for quantizer in model.quantizer.quantizers]
    latest: dict[str, torch.Tensor] = {}

    def reconstruct(target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized, codes, latents, commitment, codebook = model.quantizer(model.encoder(target))
        return model.decoder(quantized)[:, 0], codes, latents, 0.25 * commitment.mean() + codebook.mean()

    run = torch.compile(reconstruct) if compiled else reconstruct

    def loss(_step: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(0, len(sounds), (batch,))
        target = augment.sounds(sounds[rows])
        output, codes, latents, commitment = run(target)
        latest["vectors"] = latents.detach()
        for index, keeper in enumerate(keepers):
            keeper.see(codes[:, index])
        spectral = spectral_distance(output, target[:, 0])
        wave = F.l1_loss(output, target[:, 0])
        return {"loss": spectral + wave + commitment, "spectral": spectral, "wave": wave, "commitment": commitment}

    def after_step(step: int) -> None:
        interval = 25 if step < 500 else 100
        if step % interval == 0 and step < 0.7 * steps:
            for index, keeper in enumerate(keepers):
                vectors = latest["vectors"][:, index * 8 : (index + 1) * 8].transpose(1, 2).reshape(-1, 8)
                keeper.restart(vectors, interval * batch * FRAMES / CODEBOOK * 0.05)

    return fit(model, loss, work / CHECKPOINTS["spectra"], steps, peak, after_step=after_step, save_every=500)


def train_features(work: Path, steps: int, batch: int, peak: float, compiled: bool) -> DacModel:
    """Stage 2: the critic joins the loss, codebooks follow by moving average; leaves `work/audio_codec_features.pt`."""
    model = build()
    model.load_state_dict(torch.load(work / CHECKPOINTS["spectra"], weights_only=True)["model"])
    judge = critic.load(work)
    sounds = torch.from_numpy(audio_batch(load_split(work, "train").recordings))
    encoder = torch.compile(model.encoder) if compiled else model.encoder
    decoder = torch.compile(model.decoder) if compiled else model.decoder
    books = [MovingCodebook(quantizer.codebook.weight) for quantizer in model.quantizer.quantizers]
    latest: dict[str, torch.Tensor] = {}

    def loss(_step: int) -> dict[str, torch.Tensor]:
        target = augment.sounds(sounds[torch.randint(0, len(sounds), (batch,))])
        quantized, latest["codes"], joined, distance, _ = model.quantizer(encoder(target))
        latest["latents"] = torch.stack([part.detach().transpose(1, 2).reshape(-1, 8) for part in joined.split(8, 1)])
        output = decoder(quantized)[:, 0]
        spectral, loud = spectral_distance(output, target[:, 0]), loudness_distance(output, target[:, 0])
        features = critic.distance(judge, output, target[:, 0])
        total = 2.0 * spectral + 10.0 * loud + 0.5 * features + 0.25 * distance.mean()
        return {"loss": total, "spectral": spectral, "loud": loud, "features": features, "commitment": distance.mean()}

    def after_step(step: int) -> None:
        for index, book in enumerate(books):
            book.see(latest["codes"][:, index].flatten(), latest["latents"][index])
            if step % 20 == 19 and step < 0.8 * steps:
                book.reseed(latest["latents"][index], 0.02)

    return fit(model, loss, work / CHECKPOINTS["features"], steps, peak, after_step=after_step, save_every=250)


def train_decoder(work: Path, steps: int, batch: int, peak: float, compiled: bool) -> DacModel:
    """Stage 3: the decoder alone, for codes that stay as they are; leaves `work/audio_codec.pt`.

    The language models depend on the codes only, so they can train beside this stage.
    """
    model = build()
    model.load_state_dict(torch.load(work / CHECKPOINTS["features"], weights_only=True)["model"])
    model.encoder.requires_grad_(False)
    model.quantizer.requires_grad_(False)
    judge = critic.load(work)
    sounds = torch.from_numpy(audio_batch(load_split(work, "train").recordings))
    decoder = torch.compile(model.decoder) if compiled else model.decoder

    def loss(_step: int) -> dict[str, torch.Tensor]:
        target = augment.sounds(sounds[torch.randint(0, len(sounds), (batch,))], 0.5)
        with torch.no_grad():
            quantized = model.quantizer.from_codes(encode(model, target))[0]
        output = decoder(quantized)[:, 0]
        spectral, loud = spectral_distance(output, target[:, 0]), loudness_distance(output, target[:, 0])
        features = critic.distance(judge, output, target[:, 0])
        total = 2.0 * spectral + 10.0 * loud + 0.5 * features
        return {"loss": total, "spectral": spectral, "loud": loud, "features": features}

    return fit(model, loss, work / CHECKPOINTS["decoder"], steps, peak, save_every=100)


def load(work: Path, stage: str = "decoder") -> DacModel:
    """The codec after `stage` with its weights rounded to float16 (what ships), computing in float32."""
    model = build()
    state = torch.load(work / CHECKPOINTS[stage], weights_only=True)["model"]
    model.load_state_dict({name: value.half().float() for name, value in state.items()})
    return model.eval()


@torch.no_grad()
def si_snr(model: DacModel, sounds: torch.Tensor) -> float:
    """Mean scale-invariant SNR in dB of float [n,1,L] and its reconstruction (Le Roux et al. 2019)."""
    output, target = decode(model, encode(model, sounds)), sounds[:, 0]
    projection = (output * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True) * target
    ratio = projection.square().sum(-1) / (output - projection).square().sum(-1)
    return float((10 * ratio.log10()).mean())


def report(work: Path) -> None:
    """Print validation figures and codebook use of the trained codec."""
    model = load(work)
    sounds = torch.from_numpy(audio_batch(load_split(work, "validation").recordings))
    with torch.no_grad():
        codes = encode(model, sounds)
        distance = float(spectral_distance(decode(model, codes), sounds[:, 0]))
    used = [len(torch.unique(codes[:, index])) for index in range(CODEBOOKS)]
    print(f"validation SI-SNR {si_snr(model, sounds):.2f} dB, log-mel distance {distance:.3f}, codes used {used}")


def main() -> None:
    """Train one stage; after the last, print validation figures and codebook use."""
    options = arguments(
        __doc__,
        stage={"choices": tuple(CHECKPOINTS), "required": True},
        steps={"type": int, "default": 2500},
        batch={"type": int, "default": 12},
        rate={"type": float, "default": 8e-4},
        eager={"action": "store_true", "help": "do not compile (no C++ compiler needed, slower)"},
    )
    train = {"spectra": train_spectra, "features": train_features, "decoder": train_decoder}[options.stage]
    train(options.work, options.steps, options.batch, options.rate, not options.eager)
    if options.stage == "decoder":
        report(options.work)


if __name__ == "__main__":
    main()
