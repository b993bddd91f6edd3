"""What is opened, and what is refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nalora_jax.data.images import Limits, open_image
from nalora_jax.errors import NaloraError


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_transparency_becomes_white_and_grey_becomes_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 2), (10, 20, 30, 255))
    found = np.asarray(open_image(png(clear)))
    assert (found[2, 1] == (10, 20, 30)).all()
    assert (found[0, 0] == 255).all()
    assert open_image(png(noise().convert("L"))).mode == "RGB"
    palette = noise().convert("P")
    palette.info["transparency"] = 0
    assert open_image(png(palette)).mode == "RGB"


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    """A PNG of a few hundred bytes that says 60,000 x 60,000: nothing is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
    with pytest.raises(NaloraError, match="bomb.png: expected at most 50,000,000 pixels"):
        open_image(bomb + chunk(b"IEND", b""), "bomb.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage_is_named(kind) -> None:
    whole = png(noise(200, 100), kind)
    assert open_image(whole).size == (200, 100)
    with pytest.raises(NaloraError, match="half.img: expected a whole image"):
        open_image(whole[: len(whole) // 2], "half.img")
    with pytest.raises(NaloraError, match="text.png: expected a whole image"):
        open_image(b"not an image at all", "text.png")


def test_animated_thin_and_absent_images(tmp_path) -> None:
    moving = png(noise(), "GIF", save_all=True, append_images=[noise(20, 12).rotate(90)])
    with pytest.raises(NaloraError, match="cat.gif: expected a still image, found 2 frames"):
        open_image(moving, "cat.gif")
    assert open_image(moving, limits=Limits(animated=True)).size == (20, 12)
    with pytest.raises(NaloraError, match="sides that differ by at most 100 times"):
        open_image(png(Image.new("RGB", (1000, 2))), "line.png")
    with pytest.raises(NaloraError, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(NaloraError, match="at most 100 pixels"):
        open_image(png(noise()), limits=Limits(max_pixels=100))
