"""Preprocessing of images to tiles of one size, for towers that read images of one size.

An image is resized to whole tiles, and to one more tile that shows all of it. The tiles of all
images of a row follow each other.
"""

from __future__ import annotations

import abc
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from nalora_jax.common.fields import Fields
from nalora_jax.data.chat_templates import ImageLayout
from nalora_jax.data.images.patches import few_sizes, normalise_pixels, refuse_minimum
from nalora_jax.models.vision.tower_fields import (
    NEXT_SIZES,
    ONEVISION_SIZES,
    read_sizes,
)

# No side is longer after the first resizing, as in Idefics 3's processor.
_LONGEST = 4096
# Features of an image in more tiles than the limit are interpolated if the ratio is above it.
_SHRINK_FROM = 1.1


class Tiles(NamedTuple):
    """A prepared image."""

    pixels: np.ndarray  # uint8 [tiles, side, side, 3]
    size: tuple[int, int]  # height and width of the image
    # uint8 [1, side, side, 3] of a text with several images, if they are prepared differently
    among: np.ndarray | None = None


@dataclass(frozen=True)
class TileProcessor(abc.ABC):
    """Preprocessing that is applied to every image; the functions of a run on images call it like
    `nalora_jax.data.images.image_files.ImageProcessor`."""

    # what `places` counts, for the log
    nouns: ClassVar[tuple[str, ...]] = ("tiles of images", "image tokens")

    side: int  # pixels of a tile's side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int = 0  # of a tile, from the model's config
    scale: float = 1 / 255  # multiplies grey levels
    resample: int = 3  # Pillow's number of the filter

    @abc.abstractmethod
    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """Returns the numbers of tokens of all images of a text, by their heights and widths."""

    @abc.abstractmethod
    def prepare(self, image: Any) -> Tiles:
        """Returns the tiles of an RGB ``PIL.Image.Image``."""

    def with_limits(self, least: int, most: int) -> TileProcessor:
        """Returns the processor of images with at most ``most`` pixels in tiles, but with one tile
        at least.

        Raises:
          NaloraError: ``least`` is not 0.
        """
        refuse_minimum(least)
        return self._limited(most)

    @abc.abstractmethod
    def _limited(self, most: int) -> TileProcessor:
        """Returns the processor with at most ``most`` pixels in tiles."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the limits of an image's size, for the log."""

    def together(self, images: Sequence[Tiles]) -> list[Tiles]:
        """Returns the prepared images of one text, as the model reads this number of images."""
        return list(images)

    def layouts_of_prepared(self, images: Sequence[Tiles]) -> list[ImageLayout]:
        """Returns the numbers of tokens of the prepared images of a text."""
        return self.layouts([image.size for image in images])

    def places_of(self, layouts: Sequence[ImageLayout]) -> tuple[int, ...]:
        """Returns the number of tiles of the images of a text."""
        return (sum(layout.rows * layout.columns + 1 for layout in layouts),)

    def places(self, rows: Sequence[Sequence[Tiles]]) -> tuple[int, ...]:
        """Returns the number of tiles that the fullest row of prepared images needs."""
        return (max([1, *(_count_tiles(row) for row in rows)]),)

    def rounded(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Returns ``places`` rounded up to few numbers, so that few programs are compiled."""
        return tuple(map(few_sizes, places))

    def arrays(
        self, rows: Sequence[Sequence[Tiles]], places: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Returns prepared images of rows, padded to a number of ``places``.

        Returns:
          ``pixels`` uint8 ``[rows, tiles, side, side, 3]``, black after a row's last tile;
          ``images`` int32 ``[rows]``, the number of tiles in each row.
        """
        pixels = np.zeros((len(rows), places[0], self.side, self.side, 3), np.uint8)
        counts = np.zeros(len(rows), np.int32)
        for number, row in enumerate(rows):
            start = 0
            for image in row:
                end = start + len(image.pixels)
                pixels[number, start:end] = image.pixels
                start = end
            counts[number] = start
        return {"pixels": pixels, "images": counts}

    def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model's ``encode_images``: normalised tiles and their
        numbers."""
        return self.normalise(batch["pixels"]), batch["images"]

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """Converts uint8 pixels ``[..., channels]`` to normalised float32."""
        return normalise_pixels(pixels, self.mean, self.std, self.scale)

    def _resized(self, image: Any, height: int, width: int) -> Any:
        """Returns an image of another size."""
        return image.resize((width, height), resample=self.resample)

    def _cut(self, image: Any) -> list[np.ndarray]:
        """Returns the tiles of an image of whole tiles, row by row, uint8 ``[side, side, 3]``."""
        pixels = np.asarray(image, np.uint8)
        tiles = []
        for top in range(0, pixels.shape[0], self.side):
            for left in range(0, pixels.shape[1], self.side):
                tiles.append(pixels[top : top + self.side, left : left + self.side])
        return tiles


def _count_tiles(images: Sequence[Tiles]) -> int:
    """Returns the number of tiles of prepared images."""
    return sum(len(image.pixels) for image in images)


# ---------------------------------------------------------------- Idefics 3 and SmolVLM


@dataclass(frozen=True)
class SplitProcessor(TileProcessor):
    """Resizes an image to a longest side and then to whole tiles; the whole image is the last tile.

    An image of one tile is not split.
    """

    longest: int = 0  # pixels
    splits: bool = True  # False: an image is one tile

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """See `TileProcessor`."""
        layouts = []
        for height, width in sizes:
            tall, wide = self._whole_tiles(*self._first_size(height, width))
            rows = tall // self.side
            columns = wide // self.side
            if rows * columns == 1:
                layouts.append(ImageLayout(self.tokens))
            else:
                layouts.append(ImageLayout(self.tokens, rows, columns, self.tokens))
        return layouts

    def prepare(self, image: Any) -> Tiles:
        """See `TileProcessor`."""
        size = image.height, image.width
        # Rounded to grey levels after each resizing, as in the model's processor.
        first = self._resized(image, *self._first_size(*size))
        split = self._resized(first, *self._whole_tiles(first.height, first.width))
        tiles = self._cut(split)
        if len(tiles) > 1:
            tiles.append(np.asarray(self._resized(split, self.side, self.side)))
        return Tiles(np.stack(tiles), size)

    def _limited(self, most: int) -> TileProcessor:
        tiles = max(math.isqrt(most) // self.side, 1)
        return replace(self, longest=min(self.longest, tiles * self.side))

    def describe(self) -> str:
        """See `TileProcessor`."""
        side = math.ceil(self.longest / self.side)
        return f"at most {side} by {side} tiles of {self.side} by {self.side} pixels"

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size whose longest side is ``longest`` pixels, the other one even."""
        ratio = width / height
        if width >= height:
            width = self.longest
            height = int(width / ratio)
            height += height % 2
        else:
            height = self.longest
            width = int(height * ratio)
            width += width % 2
        height = max(height, 1)
        width = max(width, 1)
        ratio = width / height
        if width >= height and width > _LONGEST:
            width = _LONGEST
            height = int(width / ratio)
        elif height > width and height > _LONGEST:
            height = _LONGEST
            width = int(height * ratio)
        return max(height, 1), max(width, 1)

    def _whole_tiles(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of whole tiles."""
        if not self.splits:
            return self.side, self.side
        ratio = width / height
        if width >= height:
            width = self._up(width)
            height = self._up(int(width / ratio))
        else:
            height = self._up(height)
            width = self._up(int(height * ratio))
        return height, width

    def _up(self, length: int) -> int:
        """Returns ``length`` rounded up to whole tiles."""
        return math.ceil(length / self.side) * self.side


# ---------------------------------------------------------------- LLaVA-NeXT and LLaVA-OneVision


@dataclass(frozen=True)
class AnyresProcessor(TileProcessor):
    """Resizes an image into the best of several sizes and pads it there with black.

    The tile of the whole image, squeezed to a square, is the first. Tokens are features of this
    tile, and then of the other tiles row by row of the image, without those of the padding, each
    row with the feature of a line break after it.
    """

    sizes: tuple[tuple[int, int], ...] = ()  # heights and widths in pixels
    grid: int = 0  # features along a side of a tile, from the model's config
    # Features of more tiles than this are interpolated to its number; 0: no limit.
    most_tiles: int = 0
    # True if the images of a text with several are each one tile, padded to a square.
    squares: bool = False

    @property
    def corners(self) -> int:
        """The number of features that a token is a weighted sum of."""
        if self.most_tiles:
            return 4
        return 1

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """See `TileProcessor`. The rows and columns of tiles have no tokens of their own."""
        if self.squares and len(sizes) > 1:
            return [ImageLayout(self.tokens + 1)] * len(sizes)
        layouts = []
        for size in sizes:
            tall, wide = best_size(size, self.sizes)
            order, _ = self._order(size)
            rows = tall // self.side
            columns = wide // self.side
            layouts.append(ImageLayout(len(order), rows, columns))
        return layouts

    def prepare(self, image: Any) -> Tiles:
        """See `TileProcessor`."""
        images = importlib.import_module("PIL.Image")
        size = image.height, image.width
        tall, wide = best_size(size, self.sizes)
        height, width = _inside(size, (tall, wide))
        padded = images.new("RGB", (wide, tall))
        place = (wide - width) // 2, (tall - height) // 2
        padded.paste(self._resized(image, height, width), place)
        whole = np.asarray(self._resized(image, self.side, self.side))
        pixels = np.stack([whole, *self._cut(padded)])
        if not self.squares:
            return Tiles(pixels, size)
        longest = max(size)
        colour = tuple(int(level * 255) for level in self.mean)
        square = images.new("RGB", (longest, longest), colour)
        square.paste(image, ((longest - size[1]) // 2, (longest - size[0]) // 2))
        among = np.asarray(self._resized(square, self.side, self.side))
        return Tiles(pixels, size, among[None])

    def together(self, images: Sequence[Tiles]) -> list[Tiles]:
        """See `TileProcessor`."""
        if not self.squares or len(images) < 2:
            return list(images)
        one_tile = []
        for image in images:
            assert image.among is not None
            one_tile.append(image._replace(pixels=image.among))
        return one_tile

    def _limited(self, most: int) -> TileProcessor:
        smallest = min(self.sizes, key=lambda size: size[0] * size[1])
        within = [size for size in self.sizes if size[0] * size[1] <= most]
        return replace(self, sizes=tuple(within or [smallest]))

    def describe(self) -> str:
        """See `TileProcessor`."""
        areas = [height * width for height, width in self.sizes]
        most = max(areas) // self.side**2
        return f"at most {most} tiles of {self.side} by {self.side} pixels and the whole image's"

    def places_of(self, layouts: Sequence[ImageLayout]) -> tuple[int, ...]:
        """Returns the numbers of tiles and of tokens of the images of a text."""
        tokens = sum(layout.tokens for layout in layouts)
        return (*super().places_of(layouts), tokens)

    def places(self, rows: Sequence[Sequence[Tiles]]) -> tuple[int, ...]:
        """Returns the numbers of tiles and of tokens that the fullest row needs."""
        tokens = [len(order) for order, _ in map(self._row_order, rows)]
        return (*super().places(rows), max([1, *tokens]))

    def arrays(
        self, rows: Sequence[Sequence[Tiles]], places: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Returns prepared images of rows, padded to numbers of ``places``.

        Returns:
          The arrays of `TileProcessor`, and ``features`` int32 and ``shares`` float32
          ``[rows, tokens, corners]``: each token is the sum of these features of a row's tiles,
          weighted by the shares. The feature after the last tile is the line break's.
        """
        tiles, tokens = places
        arrays = super().arrays(rows, (tiles,))
        features = np.zeros((len(rows), tokens, self.corners), np.int32)
        shares = np.zeros((len(rows), tokens, self.corners), np.float32)
        for number, row in enumerate(rows):
            order, weights = self._row_order(row)
            order = np.where(order < 0, tiles * self.tokens, order)
            features[number, : len(order)] = order
            shares[number, : len(order)] = weights
        return arrays | {"features": features, "shares": shares}

    def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Returns the arguments of ``encode_images``: also the order of features."""
        return (*super().inputs(batch), batch["features"], batch["shares"])

    def _row_order(self, images: Sequence[Tiles]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features of the tokens of a row's images, with their shares.

        A line break is negative.
        """
        orders = [np.zeros((0, self.corners), np.int32)]
        shares = [np.zeros((0, self.corners), np.float32)]
        start = 0
        for image in images:
            if image.pixels is image.among:
                order, share = self._square_order()
            else:
                order, share = self._order(image.size)
            orders.append(np.where(order < 0, order, order + start))
            shares.append(share)
            start += len(image.pixels) * self.tokens
        return np.concatenate(orders), np.concatenate(shares)

    def _square_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of an image of one tile: its features and a line break."""
        order = np.full((self.tokens + 1, self.corners), -1, np.int32)
        order[:-1] = np.arange(self.tokens)[:, None]
        return order, _one_corner(order)

    def _order(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features of an image's tokens, ``[tokens, corners]``, with their shares."""
        tall, wide = best_size(size, self.sizes)
        tiles = tall // self.side, wide // self.side
        return feature_order(size, tiles, self.grid, self.most_tiles)


def _one_corner(order: np.ndarray) -> np.ndarray:
    """Returns shares of 1 of the first feature of each token."""
    shares = np.zeros(order.shape, np.float32)
    shares[:, 0] = 1
    return shares


def best_size(
    size: tuple[int, int], sizes: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """Returns the size of ``sizes`` that keeps most pixels of an image, and wastes fewest.

    All are heights and widths.
    """
    height, width = size
    best = sizes[0]
    most = 0
    least_waste = math.inf
    for tall, wide in sizes:
        scale = min(wide / width, tall / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        waste = tall * wide - pixels
        if pixels > most or (pixels == most and waste < least_waste):
            most = pixels
            least_waste = waste
            best = (tall, wide)
    return best


def _inside(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size with the aspect ratio of ``size`` in ``limit``."""
    height, width = size
    tall, wide = limit
    if wide / width < tall / height:
        return min(math.ceil(height * (wide / width)), tall), wide
    return tall, min(math.ceil(width * (tall / height)), wide)


@lru_cache(maxsize=512)
def feature_order(
    size: tuple[int, int], tiles: tuple[int, int], grid: int, most_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of an image's tokens: of the whole image, and of rows of its tiles.

    Args:
      size: height and width of the image.
      tiles: rows and columns of tiles.
      grid: features along a side of a tile.
      most_tiles: number of tiles above which features are interpolated; 0: no limit.

    Returns:
      int32 indices of features, tile by tile with the whole image's first and -1 for a line break,
      and float32 shares, ``[tokens, 4]``; ``[tokens, 1]`` without a limit.
    """
    height, width = size
    tall = tiles[0] * grid
    wide = tiles[1] * grid
    top = left = 0
    if width / height > wide / tall:
        top = (tall - int(round(height * (wide / width), 7))) // 2
    else:
        left = (wide - int(round(width * (tall / height), 7))) // 2
    rows = np.arange(top, tall - top)
    columns = np.arange(left, wide - left)
    down = [(rows, np.ones(len(rows), np.float32))]
    across = [(columns, np.ones(len(columns), np.float32))]
    if most_tiles:
        shrink = math.sqrt(len(rows) * len(columns) / (most_tiles * grid**2))
        fewer = len(rows), len(columns)
        if shrink > _SHRINK_FROM:
            fewer = int(len(rows) // shrink), int(len(columns) // shrink)
        down = _between(rows, fewer[0])
        across = _between(columns, fewer[1])
    orders: list[np.ndarray] = []
    shares: list[np.ndarray] = []
    for row, row_share in down:
        for column, column_share in across:
            tile = (row // grid)[:, None] * tiles[1] + (column // grid)[None, :]
            within = (row % grid)[:, None] * grid + (column % grid)[None, :]
            lines = (tile + 1) * grid**2 + within  # [rows, columns]
            share = row_share[:, None] * column_share[None, :]
            is_first = float(not orders)
            orders.append(_flat(np.arange(grid**2), lines, -1))
            shares.append(_flat(np.full(grid**2, is_first), share, is_first))
    order = np.stack(orders, axis=-1).astype(np.int32)
    return order, np.stack(shares, axis=-1).astype(np.float32)


def _flat(first: np.ndarray, lines: np.ndarray, end: float) -> np.ndarray:
    """Returns ``first`` and then each line of ``lines`` with ``end`` after it."""
    ends = np.full((len(lines), 1), end, lines.dtype)
    return np.concatenate([first, np.concatenate([lines, ends], axis=1).reshape(-1)])


def _between(places: np.ndarray, fewer: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the two of ``places`` that each of ``fewer`` new places is between, with shares.

    This is bilinear interpolation of one axis without antialiasing, in float32 as Torch does it.
    """
    scale = np.float32(len(places)) / np.float32(max(fewer, 1))
    centre = scale * (np.arange(fewer, dtype=np.float32) + np.float32(0.5))
    centre = np.maximum(centre - np.float32(0.5), np.float32(0))
    lower = centre.astype(np.int64)
    upper = np.minimum(lower + 1, len(places) - 1)
    share = centre - lower.astype(np.float32)
    return [(places[lower], 1 - share), (places[upper], share)]


# ---------------------------------------------------------------- files


def _split(f: Fields, values: dict[str, Any]) -> TileProcessor:
    """Returns the processor of Idefics 3 and SmolVLM."""
    if not f.flag("do_resize"):
        raise f.error("do_resize", "true: images must have whole tiles", "false")
    longest = Fields(f.mapping("size"), {}, f"{f.where}: size")
    side = Fields(f.mapping("max_image_size"), {}, f"{f.where}: max_image_size")
    return SplitProcessor(
        side=side.integer("longest_edge", high=2**14),
        longest=longest.integer("longest_edge", high=2**14),
        splits=f.flag("do_image_splitting"),
        **values,
    )


def _anyres(f: Fields, values: dict[str, Any]) -> AnyresProcessor:
    """Returns the processor of LLaVA-NeXT."""
    size = f.mapping("size")
    side = Fields(size, {}, f"{f.where}: size")
    name = "shortest_edge"
    if "height" in size:
        name = "height"
        if size["height"] != size.get("width"):
            raise f.error("size", "a square", str(size)[:60])
    pixels = side.integer(name, high=2**14)
    crop = f.get("crop_size") or pixels
    if f.get("do_center_crop") and crop not in (
        pixels,
        {"height": pixels, "width": pixels},
    ):
        raise f.error("crop_size", f"{pixels}, as size states", str(crop)[:60])
    sizes = read_sizes(f, pixels)
    return AnyresProcessor(side=pixels, sizes=sizes, **values)


def _onevision(f: Fields, values: dict[str, Any]) -> AnyresProcessor:
    """Returns the processor of LLaVA-OneVision."""
    return replace(_anyres(f, values), squares=True)


_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_SPLIT = _HALF | {
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
}
_NEXT: dict[str, Any] = {
    "resample": 3,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_grid_pinpoints": NEXT_SIZES,
}
_ONEVISION: dict[str, Any] = {
    "resample": 3,
    "size": {"height": 384, "width": 384},
    "image_grid_pinpoints": ONEVISION_SIZES,
}
# By transformers' class: the reader, which gets the fields that all classes share, and defaults.
TILE_PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Idefics3ImageProcessor": (_split, _SPLIT),
    "SmolVLMImageProcessor": (_split, _SPLIT),
    "LlavaNextImageProcessor": (_anyres, _NEXT),
    "LlavaOnevisionImageProcessor": (_onevision, _ONEVISION),
}
