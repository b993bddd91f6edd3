"""Preprocessing of images of any shape to patches, for towers that read packed patches.

An image keeps its aspect ratio: it is resized to whole squares of patches and divided into them.
The patches of a square that becomes one token follow each other. Rows of a batch hold the patches
of all their images one after another, so that few shapes are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.fields import Fields
from nalora_jax.data.chat_templates import ImageLayout
from nalora_jax.errors import NaloraError

# Of the longer side to the shorter, as in Qwen's processors.
_MAX_RATIO = 200


class Patches(NamedTuple):
    """A prepared image."""

    pixels: np.ndarray  # uint8 [patches, patch * patch * 3]
    # rows and columns of patches: of the image, or of each of its tiles
    grids: tuple[tuple[int, int], ...]
    layout: ImageLayout


def few_sizes(size: int) -> int:
    """Returns the smallest number of the form ``2^n`` or ``3 * 2^n`` that is at least ``size``."""
    power = 1 << max(size - 1, 0).bit_length()
    if power >= 4 and 3 * power // 4 >= size:
        return 3 * power // 4
    return power


@dataclass(frozen=True)
class PatchProcessor:
    """Preprocessing that is applied to every image; the functions of a run on images call it like
    `nalora_jax.data.images.image_files.ImageProcessor`."""

    # what `places` counts, for the log
    nouns: ClassVar[tuple[str, ...]] = ("images", "patches of images")

    patch_size: int
    merge: int  # patches along a side of the square that becomes one token
    min_pixels: int  # of resized images
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255  # multiplies grey levels
    resample: int = 3  # Pillow's number of the filter

    @property
    def square(self) -> int:
        """Pixels along a side of the square that becomes one token."""
        return self.patch_size * self.merge

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size that an image is resized to: multiples of `square`, with a number of
        pixels between ``min_pixels`` and ``max_pixels``.

        Raises:
          NaloraError: the image is too thin.
        """
        square = self.square
        ratio = max(height, width) / min(height, width)
        if ratio > _MAX_RATIO:
            expected = f"sides that differ by at most {_MAX_RATIO} times"
            raise NaloraError("image", expected=expected, found=f"{width} x {height}")
        rows = round(height / square)
        columns = round(width / square)
        pixels = rows * columns * square**2
        # Rounded down or up by the factor that brings the exact area to the limit.
        if pixels > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / square))
            columns = max(1, math.floor(width / shrink / square))
        elif pixels < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            rows = math.ceil(height * stretch / square)
            columns = math.ceil(width * stretch / square)
        return rows * square, columns * square

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """Returns the numbers of tokens of all images of a text, by their heights and widths."""
        return [self.layout_of(height, width) for height, width in sizes]

    def layout_of(self, height: int, width: int) -> ImageLayout:
        """Returns the numbers of tokens of an image with this size."""
        rows, columns = self.fitted(height, width)
        return ImageLayout(rows * columns // self.square**2)

    def views(self, image: Any) -> list[Any]:
        """Returns the images of whole squares that an RGB ``PIL.Image.Image`` becomes."""
        height, width = self.fitted(image.height, image.width)
        return [image.resize((width, height), resample=self.resample)]

    def with_limits(self, least: int, most: int) -> PatchProcessor:
        """Returns the processor of images with ``least`` to ``most`` pixels.

        Args:
          least: replaces ``min_pixels``; 0: no change.
          most: lowers ``max_pixels``, and with it a larger ``min_pixels``, to one square at least.

        Raises:
          NaloraError: ``least`` is above the largest number of pixels.
        """
        most = min(self.max_pixels, max(most, self.square**2))
        if least > most:
            expected = f"at most {most:,}, the largest number of pixels of an image"
            remedy = "see --vision.max-pixels"
            raise NaloraError(
                "--vision.min-pixels", expected=expected, found=least, remedy=remedy
            )
        least = least or min(self.min_pixels, most)
        return replace(self, max_pixels=most, min_pixels=least)

    def describe(self) -> str:
        """Returns the limits of an image's size, for the log."""
        tokens = self.max_pixels // self.square**2
        return f"{self.min_pixels:,} to {self.max_pixels:,} pixels, at most {tokens} tokens"

    def prepare(self, image: Any) -> Patches:
        """Returns the patches of an RGB ``PIL.Image.Image``."""
        pixels = []
        grids = []
        for view in self.views(image):
            patches, grid = self._squares(view)
            pixels.append(patches)
            grids.append(grid)
        layout = self.layout_of(image.height, image.width)
        return Patches(np.concatenate(pixels), tuple(grids), layout)

    def _squares(self, resized: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the patches of an image of whole squares, and its rows and columns of them."""
        p = self.patch_size
        rows = resized.height // p
        columns = resized.width // p
        m = self.merge
        # [rows / m, m, p, columns / m, m, p, channels] -> [rows / m, columns / m, m, m, p, p,
        # channels]
        squares = np.asarray(resized, np.uint8).reshape(
            rows // m, m, p, columns // m, m, p, -1
        )
        pixels = squares.transpose(0, 3, 1, 4, 2, 5, 6).reshape(rows * columns, -1)
        return pixels, (rows, columns)

    def places(self, rows: Sequence[Sequence[Patches]]) -> tuple[int, ...]:
        """Returns the numbers of images and of patches that the fullest row needs."""
        images = 0
        patches = 0
        for row in rows:
            images = max(images, sum(len(image.grids) for image in row))
            patches = max(patches, sum(len(image.pixels) for image in row))
        return max(images, 1), max(patches, self.merge**2)

    def rounded(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Returns ``places`` rounded up to few numbers, so that few programs are compiled."""
        images, patches = places
        return few_sizes(images), few_sizes(patches // self.merge**2) * self.merge**2

    def together(self, images: Sequence[Patches]) -> list[Patches]:
        """Returns the prepared images of one text, which do not depend on each other."""
        return list(images)

    def layouts_of_prepared(self, images: Sequence[Patches]) -> list[ImageLayout]:
        """Returns the numbers of tokens of the prepared images of a text."""
        return [image.layout for image in images]

    def places_of(self, layouts: Sequence[ImageLayout]) -> tuple[int, ...]:
        """Returns the numbers of images (or tiles) and of patches of the images of a text."""
        tokens = sum(layout.tokens for layout in layouts)
        return sum(map(self.views_of, layouts)), tokens * self.merge**2

    def views_of(self, layout: ImageLayout) -> int:
        """Returns the number of grids of an image."""
        return 1

    def arrays(
        self, rows: Sequence[Sequence[Patches]], places: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Returns the images of rows, padded to numbers of ``places``.

        Returns:
          ``patches`` uint8 ``[rows, patches, patch * patch * 3]``, image after image; ``grids``
          int32 ``[rows, images, 2]``, rows and columns of patches, 0 after a row's last image.
        """
        images, patches = places
        width = self.patch_size**2 * len(self.mean)
        pixels = np.zeros((len(rows), patches, width), np.uint8)
        grids = np.zeros((len(rows), images, 2), np.int32)
        for number, row in enumerate(rows):
            start = 0
            place = 0
            for image in row:
                end = start + len(image.pixels)
                pixels[number, start:end] = image.pixels
                start = end
                for grid in image.grids:
                    grids[number, place] = grid
                    place += 1
        return {"patches": pixels, "grids": grids}

    def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model's ``encode_images``: normalised patches and grids."""
        return self.normalise(batch["patches"]), batch["grids"]

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """Converts uint8 patches ``[..., patch * patch * channels]`` to normalised float32."""
        return normalise_pixels(pixels, self.mean, self.std, self.scale)


def normalise_pixels(
    pixels: jax.Array, mean: Sequence[float], std: Sequence[float], scale: float
) -> jax.Array:
    """Returns ``(scale * pixels - mean) / std`` in float32.

    Args:
      pixels: ``[..., n * channels]``, n pixels with their channels next to each other.
      mean: of each channel.
      std: of each channel.
      scale: multiplies grey levels.
    """
    repeats = pixels.shape[-1] // len(mean)
    means = jnp.tile(jnp.asarray(mean, jnp.float32), repeats)
    stds = jnp.tile(jnp.asarray(std, jnp.float32), repeats)
    x = jnp.asarray(pixels).astype(jnp.float32) * scale
    return (x - jnp.broadcast_to(means, x.shape)) / jnp.broadcast_to(stds, x.shape)


# ---------------------------------------------------------------- Pixtral


@dataclass(frozen=True)
class LongestSideProcessor(PatchProcessor):
    """Shrinks an image to a longest side, and enlarges both sides to whole squares."""

    longest: int = 0  # pixels

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """See `PatchProcessor`."""
        ratio = max(height, width) / self.longest
        if ratio > 1:
            height = max(math.floor(height / ratio), 1)
            width = max(math.floor(width / ratio), 1)
        square = self.square
        return -(-height // square) * square, -(-width // square) * square

    def layout_of(self, height: int, width: int) -> ImageLayout:
        """See `PatchProcessor`. Each row of tokens but the last is a tile of the text."""
        tall, wide = self.fitted(height, width)
        columns = wide // self.square
        return ImageLayout(columns, tall // self.square - 1, 1, columns)

    def with_limits(self, least: int, most: int) -> PatchProcessor:
        """See `PatchProcessor`; ``most`` is the square of the longest side."""
        refuse_minimum(least)
        longest = min(self.longest, max(math.isqrt(most), self.square))
        return replace(self, longest=longest)

    def describe(self) -> str:
        """See `PatchProcessor`."""
        tokens = math.ceil(self.longest / self.square) ** 2
        return f"sides of at most {self.longest} pixels, at most {tokens} tokens"


def refuse_minimum(least: int) -> None:
    """Raises a NaloraError if a lower limit of pixels is asked for, which a model has not."""
    if least:
        raise NaloraError(
            "--vision.min-pixels",
            expected="0: this model's processor has no lower limit",
            found=least,
        )


def _pixtral(f: Fields, values: dict[str, Any]) -> PatchProcessor:
    """Returns the processor of Pixtral and Mistral 3; squares of patches follow from the model."""
    if not f.flag("do_resize"):
        raise f.error("do_resize", "true: images must have whole patches", "false")
    size = Fields(f.mapping("size"), {}, f"{f.where}: size")
    patch = f.get("patch_size")
    if isinstance(patch, dict):
        sides = Fields(patch, {}, f"{f.where}: patch_size")
        if sides.integer("width") != sides.integer("height"):
            raise f.error("patch_size", "a square", str(patch)[:60])
        patch = patch["height"]
    patches = Fields({"patch_size": patch}, {}, f.where)
    return LongestSideProcessor(
        patch_size=patches.integer("patch_size", high=2**10),
        merge=1,
        min_pixels=1,
        max_pixels=2**40,
        longest=size.integer("longest_edge", high=2**14),
        **values,
    )


_PIXTRAL: dict[str, Any] = {
    "resample": 3,
    "size": {"longest_edge": 1024},
    "patch_size": {"height": 16, "width": 16},
}


# ---------------------------------------------------------------- LFM2-VL


@dataclass(frozen=True)
class NaflexProcessor(PatchProcessor):
    """Resizes an image within limits of pixels, or a large one to tiles and to one more image of
    the whole (NaFlex)."""

    tile: int = 0  # pixels of a tile's side
    tiles: tuple[int, int] = (1, 1)  # least and most; (1, 1): images are not split
    whole: bool = True  # the whole image follows its tiles
    tolerance: float = 2.0  # images are split above this factor of `max_pixels`

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """See `PatchProcessor`."""
        square = self.square
        tall = max(square, round(height / square) * square)
        wide = max(square, round(width / square) * square)
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall = max(square, math.floor(height / shrink / square) * square)
            wide = max(square, math.floor(width / shrink / square) * square)
        elif tall * wide < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            tall = math.ceil(height * stretch / square) * square
            wide = math.ceil(width * stretch / square) * square
        return tall, wide

    def layout_of(self, height: int, width: int) -> ImageLayout:
        """See `PatchProcessor`."""
        tall, wide = self.fitted(height, width)
        tokens = tall * wide // self.square**2
        rows, columns = self._tiles_of(height, width)
        if rows * columns == 1:
            return ImageLayout(tokens)
        return ImageLayout(
            tokens * self.whole, rows, columns, (self.tile // self.square) ** 2
        )

    def views_of(self, layout: ImageLayout) -> int:
        """See `PatchProcessor`."""
        return layout.rows * layout.columns + (layout.whole > 0)

    def views(self, image: Any) -> list[Any]:
        """See `PatchProcessor`."""
        rows, columns = self._tiles_of(image.height, image.width)
        views = []
        if rows * columns > 1:
            size = columns * self.tile, rows * self.tile
            large = image.resize(size, resample=self.resample)
            for top in range(0, large.height, self.tile):
                for left in range(0, large.width, self.tile):
                    box = left, top, left + self.tile, top + self.tile
                    views.append(large.crop(box))
        if self.whole or not views:
            views += super().views(image)
        return views

    def with_limits(self, least: int, most: int) -> PatchProcessor:
        """See `PatchProcessor`. An image below the file's limit is not split."""
        limited = super().with_limits(least, most)
        if limited.max_pixels < self.max_pixels:
            return replace(limited, tiles=(1, 1))  # type: ignore[call-arg]
        return limited

    def _tiles_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of tiles of an image with this size; 1 and 1: not split."""
        least, most = self.tiles
        square = self.square
        tall = max(self.patch_size, round(height / square) * square)
        wide = max(self.patch_size, round(width / square) * square)
        if most == 1 or tall * wide <= self.max_pixels * self.tolerance:
            return 1, 1
        best = (1, 1)
        nearest = math.inf
        for rows, columns in _grids(least, most):
            distance = abs(width / height - columns / rows)
            area = rows * columns * self.tile**2
            larger = distance == nearest and height * width > 0.5 * area
            if distance < nearest or larger:
                nearest = distance
                best = rows, columns
        return best


@cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Returns rows and columns of all grids of ``least`` to ``most`` tiles.

    Their order is that of LFM2-VL's processor: of a Python set of widths and heights, sorted by the
    number of tiles.
    """
    grids: set[tuple[int, int]] = set()
    for count in range(least, most + 1):
        for columns in range(1, count + 1):
            for rows in range(1, count + 1):
                if least <= rows * columns <= most:
                    grids.add((columns, rows))
    ordered = sorted(grids, key=lambda grid: grid[0] * grid[1])
    return tuple((rows, columns) for columns, rows in ordered)


def _lfm2_vl(f: Fields, values: dict[str, Any]) -> PatchProcessor:
    """Returns the processor of LFM2-VL."""
    patch = f.integer("encoder_patch_size", high=2**10)
    merge = f.integer("downsample_factor", high=2**5)
    tile = f.integer("tile_size", high=2**14)
    square = patch * merge
    if tile % square:
        raise f.error("tile_size", f"a multiple of {square}", tile)
    least = f.integer("min_image_tokens", high=2**20)
    most = f.integer("max_image_tokens", high=2**20)
    tiles = (1, 1)
    if f.flag("do_image_splitting"):
        tiles = f.integer("min_tiles", high=2**8), f.integer("max_tiles", high=2**8)
    if least > most or tiles[0] > tiles[1]:
        limits = f"{least} to {most} tokens, {tiles[0]} to {tiles[1]} tiles"
        raise f.error(
            "max_image_tokens", "limits that are not below the minima", limits
        )
    return NaflexProcessor(
        patch_size=patch,
        merge=merge,
        min_pixels=least * square**2,
        max_pixels=most * square**2,
        tile=tile,
        tiles=tiles,
        whole=f.flag("use_thumbnail"),
        tolerance=f.number("max_pixels_tolerance"),
        **values,
    )


_LFM2_VL: dict[str, Any] = {
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
}


# ---------------------------------------------------------------- Qwen2-VL and its successors


def _qwen(f: Fields, values: dict[str, Any]) -> PatchProcessor:
    """Returns the processor of Qwen2-VL and its successors."""
    if not f.flag("do_resize"):
        raise f.error(
            "do_resize", "true: images must have whole squares of patches", "false"
        )
    size = f.mapping("size")
    least = f.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = f.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    limits = Fields(
        {"shortest_edge": least, "longest_edge": most}, {}, f"{f.where}: size"
    )
    smallest = limits.integer("shortest_edge", high=2**40)
    largest = limits.integer("longest_edge", high=2**40)
    if largest < smallest:
        raise f.error("size", f"longest_edge of at least {smallest} pixels", largest)
    return PatchProcessor(
        patch_size=f.integer("patch_size", high=2**10),
        merge=f.integer("merge_size", high=2**5),
        min_pixels=smallest,
        max_pixels=largest,
        **values,
    )


_QWEN: dict[str, Any] = {
    "resample": 3,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "merge_size": 2,
}
# By transformers' class: the reader, which gets the fields that all classes share, and defaults.
PATCH_PROCESSORS: dict[
    str,
    tuple[Callable[[Fields, dict[str, Any]], PatchProcessor], dict[str, Any]],
] = {
    "Qwen2VLImageProcessor": (_qwen, _QWEN),
    "PixtralImageProcessor": (_pixtral, _PIXTRAL),
    "Lfm2VlImageProcessor": (_lfm2_vl, _LFM2_VL),
}
