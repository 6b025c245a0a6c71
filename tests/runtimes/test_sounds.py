"""WAV files in and out: every width, mixdown, resampling against scipy, and sounds that are none."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal

from runtimes.output import EmptyOutput
from runtimes.sounds import SoundError, read_sound, read_wave, resample, to_samples, write_sound

CONSTANTS = {"sample_rate": 8000, "samples": 5120, "channels": 1, "peak": 0.9}


def tone(count: int, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / rate)


def encode(values: np.ndarray, width: int) -> bytes:
    if width == 1:
        return np.rint(values * 127 + 128).astype(np.uint8).tobytes()
    whole = np.rint(values * (2 ** (8 * width - 1) - 1)).astype("<i4")
    return b"".join(int(value).to_bytes(width, "little", signed=True) for value in whole)


def save(path: Path, values: np.ndarray, width: int = 2, rate: int = 8000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(encode(values, width))
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_reads_back(tmp_path: Path, width: int) -> None:
    values = tone(2000, 8000)
    read, rate = read_wave(save(tmp_path / "in.wav", values, width))
    assert rate == 8000
    np.testing.assert_allclose(read, values, atol=2.0 ** (2 - 8 * width))


def test_24_bit_extremes(tmp_path: Path) -> None:
    read, _ = read_wave(save(tmp_path / "in.wav", np.array([-1.0, 0.0, 1.0, -0.5]), 3))
    np.testing.assert_allclose(read, [-1, 0, 1, -0.5], atol=1e-6)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(1000, 8000), tone(1000, 8000, 700)
    path = save(tmp_path / "in.wav", np.stack([left, right], 1).ravel(), channels=2)
    np.testing.assert_allclose(read_wave(path)[0], (left + right) / 2, atol=1e-4)


def test_it_is_cut_or_padded_at_the_end_and_scaled_to_the_peak(tmp_path: Path) -> None:
    for count in (3000, 5120, 9000):
        values = tone(count, 8000)
        sound = read_sound(save(tmp_path / "in.wav", values), CONSTANTS)
        assert sound.shape == (1, 1, 5120)
        assert sound.dtype == np.float32
        used = values[:5120] * (0.9 / np.abs(values[:5120]).max())
        np.testing.assert_allclose(sound[0, 0, : used.size], used, atol=2e-4)
        assert not sound[0, 0, used.size :].any()
        assert np.abs(sound).max() == pytest.approx(0.9)


@given(st.sampled_from([(44100, 8000), (48000, 8000), (16000, 8000), (8000, 16000), (11025, 8000), (22050, 24000)]))
def test_a_tone_below_both_nyquist_rates_keeps_its_pitch_and_volume(rates: tuple[int, int]) -> None:
    rate, target = rates
    sound = resample(tone(rate, rate) * np.hanning(rate), rate, target)
    assert sound.size == target
    np.testing.assert_allclose(sound, tone(target, target) * np.hanning(target), atol=2e-3)


def test_it_agrees_with_scipys_transform_of_the_same_padded_sound() -> None:
    sound = np.random.default_rng(0).normal(size=4800) * np.hanning(4800)
    expected = signal.resample(np.pad(sound, (0, 9600 - 4800)), 1600)[:800]
    np.testing.assert_allclose(resample(sound, 48000, 8000), expected, atol=5e-3)


def test_what_is_above_the_new_nyquist_rate_is_gone() -> None:
    sound = tone(48000, 48000, 6000) * np.hanning(48000)
    assert np.abs(resample(sound, 48000, 8000)).max() < 1e-3


def test_the_part_that_is_read_of_a_long_file_is_the_same_as_of_the_whole(tmp_path: Path) -> None:
    values = tone(44100 * 20, 44100)
    whole = resample(read_wave(save(tmp_path / "long.wav", values, rate=44100))[0], 44100, 8000)[:5120]
    np.testing.assert_allclose(
        read_sound(tmp_path / "long.wav", CONSTANTS)[0, 0], whole * 0.9 / np.abs(whole).max(), atol=2e-3
    )


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    sound = (tone(5120, 8000) * 1.8).astype(np.float32)[None, None]
    write_sound(tmp_path / "out.wav", sound, CONSTANTS)
    again = read_sound(tmp_path / "out.wav", CONSTANTS)
    np.testing.assert_allclose(again, sound, atol=1e-4)
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 5120)


def test_beyond_full_scale_is_clipped_not_wrapped() -> None:
    assert to_samples(np.array([1.5, -1.5, 0.0], np.float32)).tolist() == [32767, -32767, 0]


@pytest.mark.parametrize("values", [[0.0] * 8, [0.4] * 8, [1e-4, -1e-4], [0.1, np.nan], [0.1, np.inf], []])
def test_a_silent_or_broken_sound_is_no_output(tmp_path: Path, values: list[float]) -> None:
    with pytest.raises(EmptyOutput):
        write_sound(tmp_path / "out.wav", np.array(values, np.float32), CONSTANTS)
    assert list(tmp_path.iterdir()) == []


def wav_bytes(tmp_path: Path) -> bytes:
    return save(tmp_path / "whole.wav", tone(1000, 8000)).read_bytes()


def float_wav() -> bytes:
    body = b"fmt " + struct.pack("<IHHIIHH", 16, 3, 1, 8000, 32000, 4, 32) + b"data" + struct.pack("<I", 0)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


@pytest.mark.parametrize("kind", ["empty", "text", "float", "truncated", "no-frames", "silent", "rate"])
def test_what_is_no_sound_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in.wav"
    whole = wav_bytes(tmp_path)
    contents = {
        "empty": b"",
        "text": b"not a sound at all, just text",
        "float": float_wav(),
        "truncated": whole[:-500],
        "no-frames": whole[:44],
        "silent": save(tmp_path / "silent.wav", np.zeros(900)).read_bytes(),
        "rate": save(tmp_path / "rate.wav", tone(900, 8000), rate=7).read_bytes(),
    }
    path.write_bytes(contents[kind])
    with pytest.raises(SoundError) as caught:
        read_sound(path, CONSTANTS)
    assert str(path) in str(caught.value)
    assert caught.value.way_out


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoundError, match="cannot be read"):
        read_sound(tmp_path / "none.wav", CONSTANTS)
