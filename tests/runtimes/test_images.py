"""Image files in and out: round trips, the fit rule, formats, and pictures that are none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.images import ImageError, fit, read_image, to_pixels, write_image
from runtimes.output import EmptyOutput, OutputError, check_writable

GREY = {"size": [32, 32], "channels": 1, "mean": [0.5], "std": [0.5]}
COLOUR = {"size": [12, 16], "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.5]}


def picture(height: int, width: int, channels: int = 1) -> np.ndarray:
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, channels))
    return values.astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, **options)
    return path


@pytest.mark.parametrize(("constants", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_round_trip_is_exact(tmp_path: Path, constants: dict, channels: int) -> None:
    pixels = picture(constants["size"][0], constants["size"][1], channels)
    tensor = read_image(save(tmp_path / "in.png", pixels), constants)
    assert tensor.shape == (1, channels, *constants["size"])
    assert tensor.dtype == np.float32
    write_image(tmp_path / "out.png", tensor, constants)
    with Image.open(tmp_path / "out.png") as again:
        assert again.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(again).reshape(pixels.shape), pixels)


def test_values_are_pixels_less_the_mean_by_the_deviation(tmp_path: Path) -> None:
    pixels = picture(12, 16, 3)
    tensor = read_image(save(tmp_path / "in.png", pixels), COLOUR)
    expected = (pixels[3, 5, 2] / 255 - 0.6) / 0.5
    assert tensor[0, 2, 3, 5] == pytest.approx(expected, abs=1e-6)


def test_a_28_pixel_digit_is_padded_by_two_and_no_pixel_changes() -> None:
    pixels = picture(28, 28)
    fitted = np.asarray(fit(Image.fromarray(pixels[..., 0]), [32, 32]))
    np.testing.assert_array_equal(fitted[2:30, 2:30], pixels[..., 0])
    fitted = fitted.copy()
    fitted[2:30, 2:30] = 0
    assert not fitted.any()


@pytest.mark.parametrize(
    ("size", "box"),
    [((64, 64), (0, 32, 0, 32)), ((64, 32), (0, 32, 8, 24)), ((10, 40), (12, 20, 0, 32)), ((29, 29), (0, 32, 0, 32)),
     ((4, 4), (0, 32, 0, 32)), ((1, 1000), (15, 16, 0, 32))],
)  # fmt: skip
def test_another_size_is_scaled_with_its_aspect_ratio_and_centred(size: tuple[int, int], box: tuple[int, ...]) -> None:
    fitted = np.asarray(fit(Image.new("L", (size[1], size[0]), 200), [32, 32]))
    top, bottom, left, right = box
    assert (fitted[top:bottom, left:right] == 200).all()
    assert fitted.astype(int).sum() == 200 * (bottom - top) * (right - left)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = to_pixels(read_image(tmp_path / "wide.png", GREY), GREY)[..., 0]
    np.testing.assert_allclose(pixels, wide / 65535 * 255, atol=0.51)


def test_transparency_lies_over_black_and_a_palette_is_resolved(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:16, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    grey = to_pixels(read_image(tmp_path / "alpha.png", GREY), GREY)[..., 0]
    assert (grey[:16] == 0).all()
    assert (grey[16:] == 255).all()
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", GREY).shape == (1, 1, 32, 32)


def test_the_rotation_a_camera_wrote_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    save(tmp_path / "photo.jpg", pixels, exif=exif)
    turned = to_pixels(read_image(tmp_path / "photo.jpg", GREY), GREY)[..., 0]
    assert turned[:14].max() < 20
    assert turned[18:].min() > 235


def png_start(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start_of_pixels = struct.pack(">I", 100) + b"IDAT" + zlib.compress(b"\0" * 50)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + start_of_pixels


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not an image"),
        (b"hello, this is text", "not an image"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "not an image"),
        (png_start(100_000, 100_000), "pixels"),
        (png_start(10_000, 10_000), "pixels"),
        (png_start(32, 32), "cannot be read"),
    ],
    ids=["empty", "text", "sound", "bomb", "large", "truncated"],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "in.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=text) as caught:
        read_image(path, GREY)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(path, GREY)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, np.nan, np.inf])
def test_a_picture_of_one_colour_or_of_nan_is_no_output(tmp_path: Path, value: float) -> None:
    with pytest.raises(EmptyOutput):
        write_image(tmp_path / "out.png", np.full((1, 1, 32, 32), value, np.float32), GREY)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_and_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder does not exist"):
        check_writable(tmp_path / "none" / "out.png")
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    old = tmp_path / "out.png"
    old.write_bytes(b"old")
    check_writable(old)
    assert old.read_bytes() == b"old"
    with pytest.raises(EmptyOutput):
        write_image(old, np.zeros((1, 1, 32, 32), np.float32), GREY)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]
