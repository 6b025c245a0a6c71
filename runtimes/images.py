"""Image files <-> the tensors of the image encoder and decoder.

The constants come from the manifest's `preprocessing` alone: {"size": [H, W], "channels": 1 | 3, "mean": [...],
"std": [...]}; a tensor value is (pixel in 0..1 - mean) / std, layout [1, C, H, W] float32.

Fit rule for an image of any size: where it is smaller by an even margin of at most a quarter of the size on both
axes (a 28x28 digit for 32x32), it is padded with black on all sides and no pixel changes. Otherwise it is resized
with its aspect ratio kept (bicubic, antialiased) until it touches the size, and the rest is black, centred.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import Fault
from runtimes.output import DECODED, EmptyOutput, write_output

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Array = np.ndarray[Any, Any]
FORMATS = ("PNG", "JPEG")
# 64 MPixel: 256 MB as RGBA, more than any camera a small device meets; a bomb's header asks for more.
MAX_PIXELS = 1 << 26


class ImageError(Fault):
    """An image file that cannot be read or used."""


def read_image(path: Path, preprocessing: Mapping[str, Any]) -> Array:
    """An image file as float32 [1, C, H, W], normalised. Transparency is laid over black; EXIF rotation is applied.

    Raises ImageError: not there, not a PNG or JPEG, truncated, or over MAX_PIXELS.
    """
    pixels = fit(_load(path, int(preprocessing["channels"])), preprocessing["size"])
    return normalise(pixels, preprocessing)


def _load(path: Path, channels: int) -> PillowImage:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():  # a pipe would block
        raise ImageError("cannot be read (it is no file)", str(path), "Check the path")
    try:
        # Pillow only warns about sizes from 89 MPixel up; here MAX_PIXELS decides, below that.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{image.width}x{image.height} pixels is over {MAX_PIXELS}", str(path), "Scale it down"
                )
            return _to_mode(ImageOps.exif_transpose(image), channels)
    except Image.DecompressionBombError as error:
        raise ImageError(f"over {MAX_PIXELS} pixels", str(path), "Scale it down") from error
    except UnidentifiedImageError as error:
        raise ImageError("is not an image that can be read", str(path), f"Give one of: {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on a broken file
        raise ImageError(f"cannot be read ({error})", str(path), "Check the path and the file") from error


def _to_mode(image: PillowImage, channels: int) -> PillowImage:
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # 16-bit grey: Pillow's own conversion to "L" clips at 255 instead of scaling.
        wide = np.asarray(image).astype(np.uint32).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: PillowImage, size: Sequence[int]) -> PillowImage:
    """The image at exactly [H, W], by the module's fit rule."""
    from PIL import Image

    height, width = size
    margins = (height - image.height, width - image.width)
    if not all(0 <= m <= total // 4 and m % 2 == 0 for m, total in zip(margins, size, strict=True)):
        scale = min(height / image.height, width / image.width)
        smaller = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(smaller, Image.Resampling.BICUBIC)
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def normalise(image: PillowImage, preprocessing: Mapping[str, Any]) -> Array:
    """8-bit image -> float32 [1, C, H, W]."""
    pixels = np.asarray(image, np.float32) / 255
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])


def to_pixels(image: Array, preprocessing: Mapping[str, Any]) -> Array:
    """float32 [1, C, H, W] of a decoder -> uint8 [H, W, C].

    Raises EmptyOutput where a value is not finite or the picture is a single colour.
    """
    chw = np.asarray(image, np.float32).reshape(image.shape[-3:])
    if not np.isfinite(chw).all():
        raise EmptyOutput("holds NaN or infinity", "decoded image", DECODED)
    mean, std = (np.asarray(preprocessing[key], np.float32)[:, None, None] for key in ("mean", "std"))
    pixels: Array = np.rint(np.clip(chw * std + mean, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    if (pixels == pixels[0, 0]).all():
        raise EmptyOutput(f"is a single colour ({pixels[0, 0].tolist()})", "decoded image", DECODED)
    return pixels


def write_image(path: Path, image: Array, preprocessing: Mapping[str, Any]) -> None:
    """Writes a decoder's float32 [1, C, H, W] as a PNG. Raises EmptyOutput, OutputError; never leaves half a file."""
    from PIL import Image

    pixels = to_pixels(image, preprocessing)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    write_output(path, buffer.getvalue())
