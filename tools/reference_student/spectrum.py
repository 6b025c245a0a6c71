"""Mel spectrograms, for the audio codec's loss and the speech judge's input."""

from functools import cache

import torch
from transformers.audio_utils import mel_filter_bank

from tools.reference_student.data import SAMPLE_RATE


@cache
def _filters(window: int, bands: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mel filters of peak 1, float32 [window/2+1, bands], and a Hann window [window] that keeps a sine's amplitude."""
    bank = mel_filter_bank(window // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="slaney")
    taper = torch.hann_window(window)
    return torch.from_numpy(bank).float(), taper * (2 / taper.sum())


def log_mel(
    sound: torch.Tensor, window: int = 256, hop: int = 128, bands: int = 40, floor: float = 1e-3
) -> torch.Tensor:
    """float [n, L] -> natural log of mel magnitudes, float [n, bands, 1 + L/hop]; values below `floor` are clamped."""
    bank, taper = _filters(window, bands)
    spectrum = torch.stft(sound.float(), window, hop, window=taper, return_complex=True, pad_mode="constant")
    # The small addition keeps the gradient of |0| finite.
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (magnitude.transpose(1, 2) @ bank).transpose(1, 2).clamp(min=floor).log()
