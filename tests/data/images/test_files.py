"""What is opened, and what is refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from nalora_jax.data.images.files import open_image
from nalora_jax.errors import NaloraError


def png(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width=20, height=12):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_transparency_becomes_white_and_grey_becomes_rgb_within_the_limit_of_pixels():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 2), (10, 20, 30, 255))
    found = np.asarray(open_image(png(clear)))
    assert (found[2, 1] == (10, 20, 30)).all()
    assert (found[0, 0] == 255).all()
    assert open_image(png(noise().convert("L"))).mode == "RGB"
    palette = noise().convert("P")
    palette.info["transparency"] = 0
    assert open_image(png(palette)).mode == "RGB"
    with pytest.raises(NaloraError, match="at most 100 pixels"):
        open_image(png(noise()), max_pixels=100)


@pytest.mark.parametrize(("kind", "orientation"), [*(("JPEG", i) for i in range(1, 9)), ("TIFF", 6)])
def test_photos_are_turned_upright_as_transformers_turns_them(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{kind.lower()}"
    noise().save(path, kind, exif=exif)
    upright = load_image(str(path))
    assert upright.size == ((12, 20) if orientation > 4 else (20, 12))
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(upright))


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(color, values, clear=b""):
    """A PNG of 16 bits per channel: uint16 ``[height, width, channels]``."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    middle = chunk(b"tRNS", clear) if clear else b""
    return SIGNATURE + header + middle + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bits_keep_their_upper_eight_in_grey_as_in_colour():
    values = np.random.default_rng(0).integers(0, 2**16, (4, 6, 1), dtype=np.uint16)
    grey = np.asarray(open_image(deep_png(0, values)))
    np.testing.assert_array_equal(grey, np.repeat(values >> 8, 3, axis=2))
    color = np.asarray(open_image(deep_png(2, np.repeat(values, 3, axis=2))))
    np.testing.assert_array_equal(grey, color)
    for kind in ("TIFF", "PPM"):
        saved = png(Image.fromarray(values[..., 0]), kind)
        np.testing.assert_array_equal(np.asarray(open_image(saved)), grey)
    clear = deep_png(0, np.array([[[1000], [1001]]], np.uint16), struct.pack(">H", 1000))
    assert np.asarray(open_image(clear))[0, :, 0].tolist() == [255, 1001 >> 8]


HALF = slice(0, 1000)  # of images with more bytes
BOMB_HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
BOMB = BOMB_HEADER + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")
MOVING = png(noise(), "GIF", save_all=True, append_images=[noise().rotate(180)])
REFUSED = {
    "whole numbers of 32 bits": (png(Image.new("I", (4, 4)), "TIFF"), "expected 8 or 16 bits per channel"),
    "floats": (png(Image.new("F", (4, 4)), "TIFF"), "expected 8 or 16 bits per channel"),
    "a decompression bomb, by its header": (SIGNATURE + BOMB, "expected at most 50,000,000 pixels"),
    "half a PNG": (png(noise(200, 100))[HALF], "expected a whole image"),
    "half a JPEG": (png(noise(200, 100), "JPEG")[HALF], "expected a whole image"),
    "half a WebP": (png(noise(200, 100), "WEBP")[HALF], "expected a whole image"),
    "a text": (b"not an image at all", "expected a whole image"),
    "a moving image": (MOVING, "expected a still image, found 2 frames"),
    "a line": (png(Image.new("RGB", (1000, 2))), "sides that differ by at most 100 times"),
    "an absent file": (Path("none.png"), "no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_cannot_be_read_are_refused_by_name(case):
    image, message = REFUSED[case]
    with pytest.raises(NaloraError, match=f"photo.img: .*{message}"):
        open_image(image, "photo.img")
