"""Decoding of one image from a file or bytes to RGB, after checks of its format, size and frames."""

from __future__ import annotations

import importlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError

# Formats that are decoded. Pillow has dozens of rarer decoders, which an untrusted file could
# reach.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Extensions of these formats.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Limits:
    """Limits on the images that are decoded."""

    # Maximum pixels. A small file can claim billions (a decompression bomb); it is refused before
    # decoding.
    max_pixels: int = 50_000_000
    # Largest ratio of the longer side to the shorter: the processor would reduce thinner
    # images to a few pixels.
    max_ratio: float = 100.0
    # Read the first frame of animated images instead of refusing them.
    animated: bool = False


def pillow() -> Any:
    """Returns ``PIL.Image``.

    Raises:
      NaloraError: Pillow is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        expected, remedy = "the package Pillow", "pip install 'nalora_jax[vision]'"
        raise NaloraError("images", expected=expected, found=error, remedy=remedy) from error


def open_image(source: str | Path | bytes, name: str = "", limits: Limits | None = None) -> Any:
    """Returns the image upright, as an RGB ``PIL.Image.Image``; transparent parts become white.

    The image is rotated and mirrored according to its EXIF orientation, as in transformers'
    ``load_image``. Images with 16 bits per channel, grey or colour, keep the upper 8 bits.

    Args:
      source: a file's path, or its content.
      name: of the image in messages; the path by default.
      limits: of size, shape and frames.

    Raises:
      NaloraError: the file is missing, is not a complete image of a known format, is outside of
        ``limits``, or has 32-bit integers or floats, whose range is unknown.
    """
    images, limits = pillow(), limits or Limits()
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            # Pillow warns about its size limit and odd metadata; `_check` enforces limits with the
            # image's name.
            warnings.simplefilter("ignore")
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            image = images.open(io.BytesIO(content), formats=FORMATS)
            _check(image, name, limits)
            image.load()
            return flattened(_eight_bits(_upright(image), image.format, name))
    except images.DecompressionBombError as error:
        raise _too_large(name, limits, error) from error
    except NaloraError:
        raise
    except FileNotFoundError as error:
        raise NaloraError(name, expected="an image", found="no such file") from error
    except Exception as error:  # decoders raise many exception types
        raise NaloraError(
            name,
            expected=f"a whole image ({', '.join(FORMATS)})",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy="it is damaged, truncated or of another format: remove it or save it again",
        ) from error


def _check(image: Any, name: str, limits: Limits) -> None:
    """Checks the header of an image against the limits."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_large(name, limits, f"{width} x {height}")
    if min(width, height) < 1 or max(width, height) > limits.max_ratio * min(width, height):
        expected = f"sides that differ by at most {limits.max_ratio:g} times"
        raise NaloraError(name, expected=expected, found=image.size)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and not limits.animated:
        remedy = "save one of them as an image of its own"
        raise NaloraError(name, expected="a still image", found=f"{frames} frames", remedy=remedy)


def _too_large(name: str, limits: Limits, actual: object) -> NaloraError:
    return NaloraError(
        name,
        expected=f"at most {limits.max_pixels:,} pixels",
        found=actual,
        remedy="make it smaller; files that claim to be this large are often made to exhaust memory",
    )


def _upright(image: Any) -> Any:
    return importlib.import_module("PIL.ImageOps").exif_transpose(image)


def _eight_bits(image: Any, kind: str, name: str) -> Any:
    """Returns a 16-bit grey image with 8 bits; Pillow's conversion would clip it to white."""
    # PNG and PPM files have at most 16 bits; some Pillow versions read them as "I".
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        actual = f"mode {image.mode} (32 bits), whose range is not known"
        remedy = "scale its values to 0 to 255 and save it with 8 bits per channel"
        raise NaloraError(name, expected="8 or 16 bits per channel", found=actual, remedy=remedy)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = pillow().fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(pillow().fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def flattened(image: Any) -> Any:
    """Returns ``image`` as RGB, with transparent parts white, as in transformers' processors."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    images = pillow()
    return images.alpha_composite(images.new("RGBA", image.size, (255, 255, 255, 255)), image).convert(
        "RGB"
    )
