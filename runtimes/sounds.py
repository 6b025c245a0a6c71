"""WAV files <-> the tensors of the audio encoder and decoder.

The constants come from the manifest's `preprocessing` alone: {"sample_rate": Hz, "samples": N, "channels": 1,
"peak": p}. A file becomes float32 [1, 1, N]: channels averaged, resampled to `sample_rate`, cut or zero-padded at the
end to N samples, and scaled so that the largest magnitude is `peak`.

PCM of 8 (unsigned), 16, 24 and 32 bits is read; 16-bit mono PCM is written.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import Fault
from runtimes.output import DECODED, EmptyOutput, write_output

Array = np.ndarray[Any, Any]
# Two minutes of 48 kHz stereo: bounds the memory that a hostile file can ask for.
MAX_VALUES = 2 * 60 * 48_000 * 2
RATES = range(1_000, 384_001)
# -60 dB of full scale: 16-bit sound at this peak has 5 bits left, and speech is not audible in it.
SILENCE = 1e-3


class SoundError(Fault):
    """A sound file that cannot be read or used."""


def read_sound(path: Path, preprocessing: Mapping[str, Any]) -> Array:
    """A WAV file as float32 [1, 1, samples]. Raises SoundError: not there, not PCM WAV, truncated, too long, silent."""
    target, samples = int(preprocessing["sample_rate"]), int(preprocessing["samples"])
    # What comes a while after the cut cannot reach the samples before it.
    sound, rate = read_wave(path, seconds=samples / target + 1)
    sound = resample(sound, rate, target)[:samples]
    peak = float(np.abs(sound).max(initial=0.0))
    if peak < SILENCE:
        raise SoundError("is silent in the part that is used", str(path), "Give a recording with a louder start")
    fitted = np.zeros((1, 1, samples), np.float32)
    fitted[0, 0, : sound.size] = sound * (float(preprocessing["peak"]) / peak)
    return fitted


def read_wave(path: Path, seconds: float = math.inf) -> tuple[Array, int]:
    """The first `seconds` of a PCM WAV file as (float64 [N] in -1..1, channels averaged; sample rate in Hz)."""
    if not path.is_file():  # a pipe would block
        raise SoundError("cannot be read (it is no file)", str(path), "Check the path")
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            if width not in _DECODERS or rate not in RATES:
                raise SoundError(f"{8 * width} bit at {rate} Hz is not supported", str(path), _WAY_OUT)
            frames = math.ceil(min(seconds * rate, frames))
            if frames * channels > MAX_VALUES:
                raise SoundError(
                    f"{frames} frames of {channels} channels are too much", str(path), "Cut it, or mix it down"
                )
            data = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        raise SoundError(f"is not a PCM WAV file ({error or 'truncated'})", str(path), _WAY_OUT) from error
    except OSError as error:
        raise SoundError(f"cannot be read ({error.strerror})", str(path), "Check the path and the file") from error
    if not data or len(data) != frames * channels * width:
        raise SoundError(
            f"holds {len(data)} of {frames * channels * width} bytes", str(path), "Record or copy it again"
        )
    return _DECODERS[width](data).reshape(-1, channels).mean(axis=1), rate


def _decode_24(data: bytes) -> Array:
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    # The low byte stays 0, so this is the 24-bit value times 256.
    return padded.view("<i4")[:, 0] / 2.0**31


_DECODERS: Mapping[int, Callable[[bytes], Array]] = {
    1: lambda data: (np.frombuffer(data, np.uint8) - 128.0) / 128.0,
    2: lambda data: np.frombuffer(data, "<i2") / 2.0**15,
    3: _decode_24,
    4: lambda data: np.frombuffer(data, "<i4") / 2.0**31,
}
_WAY_OUT = "Convert it to 16-bit PCM: ffmpeg -i IN -c:a pcm_s16le OUT.wav"


def resample(sound: Array, rate: int, target: int) -> Array:
    """Band-limited resampling by the Fourier transform: the spectrum is cut, or zero-padded, at the lower Nyquist rate.

    The end is zero-padded first, to a length at which the ratio is exact (so pitch and time never drift) and to keep
    the end of the sound from wrapping round into its start. Returns ceil(N * target / rate) samples.
    Source: A. V. Oppenheim and R. W. Schafer, Discrete-Time Signal Processing, section 4.6 (change of rate).
    """
    if rate == target:
        return sound
    divisor = math.gcd(rate, target)
    up, down = target // divisor, rate // divisor
    blocks = math.ceil((sound.size + rate // 20) / down)
    # A power-of-two or 3-smooth number of blocks keeps the transform fast where `down` is small itself.
    length = _smooth(blocks) * down
    spectrum = np.fft.rfft(sound, length)
    out_length = length // down * up
    kept = np.zeros(out_length // 2 + 1, np.complex128)
    shared = (min(length, out_length) + 1) // 2  # below the lower Nyquist frequency, which is dropped
    kept[:shared] = spectrum[:shared]
    return np.fft.irfft(kept, out_length)[: math.ceil(sound.size * up / down)] * (up / down)


def _smooth(number: int) -> int:
    """The smallest 2^a or 3 * 2^a that is at least `number`."""
    power = 1 << max(number - 1, 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= number else power


def to_samples(sound: Array) -> Array:
    """float32 [1, 1, N] of a decoder -> int16 [N]; beyond full scale is clipped.

    Raises EmptyOutput where a value is not finite or the sound is silent (its swing is below SILENCE).
    """
    values = np.asarray(sound, np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise EmptyOutput("holds NaN or infinity", "decoded sound", DECODED)
    if values.size == 0 or np.ptp(values) < 2 * SILENCE:  # a constant offset is silence too
        raise EmptyOutput("is silent", "decoded sound", DECODED)
    return np.rint(np.clip(values, -1, 1) * 32767).astype(np.int16)


def write_sound(path: Path, sound: Array, preprocessing: Mapping[str, Any]) -> None:
    """Writes a decoder's float32 [1, 1, N] as a WAV. Raises EmptyOutput, OutputError; never leaves half a file."""
    samples = to_samples(sound)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(preprocessing["sample_rate"]))
        file.writeframes(samples.astype("<i2").tobytes())
    write_output(path, buffer.getvalue())
