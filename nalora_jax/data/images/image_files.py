"""Decoding of images after checks of format, size and frames, and preprocessing for encoders.

Images are resized, cropped and scaled as in ``preprocessor_config.json``; the tokenizer of a text
encoder pads rows to equal length, with special tokens from its post-processor. Images stay uint8 (a
quarter of the bytes) until they are on the device, where `ImageProcessor.normalise` converts them.
"""

from __future__ import annotations

import importlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from nalora_jax.common.fields import Fields
from nalora_jax.data.images.patches import (
    PATCH_PROCESSORS,
    PatchProcessor,
    few_sizes,
    normalise_pixels,
)
from nalora_jax.data.images.tiles import TILE_PROCESSORS, TileProcessor
from nalora_jax.data.tokenizer import read_backend, read_json, read_settings, token_text
from nalora_jax.errors import NaloraError

# Formats that are decoded. Pillow has dozens of rarer decoders, which an untrusted file could
# reach.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Extensions of these formats.
IMAGE_EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
)


# Pixels of an image. A small file can claim billions (a decompression bomb); it is refused before
# decoding.
MAX_PIXELS = 50_000_000
_ORIENTATION = 0x0112  # EXIF's number of the field
_QUARTER_TURNS = (5, 6, 7, 8)  # its values for images that are stored on their side
# Of the longer side to the shorter: the processor would reduce thinner images to a few pixels.
_MAX_RATIO = 100


def pillow() -> Any:
    """Returns ``PIL.Image``.

    Raises:
      NaloraError: Pillow is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        expected = "the package Pillow"
        remedy = "pip install 'nalora_jax[vision]'"
        raise NaloraError(
            "images", expected=expected, found=error, remedy=remedy
        ) from error


def open_image(
    source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS
) -> Any:
    """Returns the image upright, as an RGB ``PIL.Image.Image``; transparent parts become white.

    The image is rotated and mirrored according to its EXIF orientation, as in transformers'
    ``load_image``. Images with 16 bits per channel, grey or colour, keep the upper 8 bits.

    Args:
      source: a file's path, or its content.
      name: of the image in messages; the path by default.
      max_pixels: limit of its size.

    Raises:
      NaloraError: the file is missing, is not a complete still image of a known format, is too
        large or too thin, or has 32-bit integers or floats, whose range is unknown.
    """
    images = pillow()
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            # Pillow warns about its size limit and odd metadata; `_check` names the image.
            warnings.simplefilter("ignore")
            if isinstance(source, bytes):
                content = source
            else:
                content = Path(source).read_bytes()
            image = images.open(io.BytesIO(content), formats=FORMATS)
            _check(image, name, max_pixels)
            image.load()
            upright = importlib.import_module("PIL.ImageOps").exif_transpose(image)
            return flatten_alpha(_eight_bits(upright, image.format, name))
    except images.DecompressionBombError as error:
        raise _too_large(name, max_pixels, error) from error
    except NaloraError:
        raise
    except FileNotFoundError as error:
        raise NaloraError(name, expected="an image", found="no such file") from error
    except Exception as error:  # decoders raise many exception types
        expected = f"a whole image ({', '.join(FORMATS)})"
        found = f"{type(error).__name__}: {error}"[:200]
        remedy = (
            "it is damaged, truncated or of another format: remove it or save it again"
        )
        raise NaloraError(
            name, expected=expected, found=found, remedy=remedy
        ) from error


def image_size(source: Path | bytes, where: str) -> tuple[int, int]:
    """Returns height and width of the upright image, from its header.

    Args:
      source: a file's path, or its content.
      where: names the image in messages.

    Raises:
      NaloraError: the file is missing, or has no header of a known format.
    """
    images = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            with images.open(opened, formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
    except Exception as error:  # decoders raise many exception types
        expected = f"an image ({', '.join(FORMATS)})"
        found = f"{type(error).__name__}: {error}"[:200]
        raise NaloraError(where, expected=expected, found=found) from error
    if turned:
        return width, height
    return height, width


def file_below(folder: Path, name: str, where: str) -> Path:
    """Returns the path of an image that a record names; records may come from an untrusted author.

    Args:
      folder: folder of the images, absolute and without links.
      name: path in the folder.
      where: names the record in messages.

    Raises:
      NaloraError: the path leads out of the folder.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise NaloraError(where, expected=f"a file below {folder}", found=name[:80])
    return path


def _check(image: Any, name: str, max_pixels: int) -> None:
    """Checks the header of an image against the limits."""
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, max_pixels, f"{width} x {height}")
    if min(width, height) < 1 or max(width, height) > _MAX_RATIO * min(width, height):
        expected = f"sides that differ by at most {_MAX_RATIO} times"
        raise NaloraError(name, expected=expected, found=image.size)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        remedy = "save one of them as an image of its own"
        raise NaloraError(
            name, expected="a still image", found=f"{frames} frames", remedy=remedy
        )


def _too_large(name: str, max_pixels: int, found: object) -> NaloraError:
    remedy = "make it smaller; files that claim to be this large are often made to exhaust memory"
    return NaloraError(
        name, expected=f"at most {max_pixels:,} pixels", found=found, remedy=remedy
    )


def _eight_bits(image: Any, kind: str, name: str) -> Any:
    """Returns a 16-bit grey image with 8 bits; Pillow's conversion would clip it to white."""
    # PNG and PPM files have at most 16 bits; some Pillow versions read them as "I".
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        actual = f"mode {image.mode} (32 bits), whose range is not known"
        remedy = "scale its values to 0 to 255 and save it with 8 bits per channel"
        raise NaloraError(
            name, expected="8 or 16 bits per channel", found=actual, remedy=remedy
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = pillow().fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(
            pillow().fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        )
    return grey


def flatten_alpha(image: Any) -> Any:
    """Returns ``image`` as RGB, with transparent parts white, as in transformers' processors."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    images = pillow()
    image = image.convert("RGBA")
    white = images.new("RGBA", image.size, (255, 255, 255, 255))
    return images.alpha_composite(white, image).convert("RGB")


_FILES = ("preprocessor_config.json", "processor_config.json")
_HAMMING = 5  # the last of Pillow's numbers of resize filters
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_ALWAYS = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_SQUARE = {"size": {"height": 224, "width": 224}}
_LARGEST = 1e30  # bound on a channel's mean and standard deviation
# Defaults of each processor class in transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {
        **_ALWAYS, **_CLIP, "resample": 3, "size": {"shortest_edge": 224}, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "SiglipImageProcessor": {**_ALWAYS, **_HALF, **_SQUARE, "resample": 3},
    "Siglip2ImageProcessor": {
        **_ALWAYS, **_HALF, "resample": 2, "patch_size": 16, "max_num_patches": 256,
    },
    "ViTImageProcessor": {**_ALWAYS, **_HALF, **_SQUARE, "resample": 2, "default_to_square": True},
}  # fmt: skip
_OF_CLIP = ("BitImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
DEFAULTS |= dict.fromkeys(_OF_CLIP, DEFAULTS["CLIPImageProcessor"])
DEFAULTS["ViTFeatureExtractor"] = DEFAULTS["ViTImageProcessor"]
DEFAULTS["Gemma3ImageProcessor"] = DEFAULTS["SiglipImageProcessor"] | {"resample": 2}
_VARIABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    **PATCH_PROCESSORS,
    **TILE_PROCESSORS,
}
for _kind, (_, _defaults) in _VARIABLE.items():
    DEFAULTS[_kind] = {**_ALWAYS, **_CLIP, **_defaults}


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing that is applied to every image."""

    resize: tuple[int, int] | None = None  # height and width
    shortest: int = (
        0  # length of the shorter side, keeping the aspect ratio; 0: use `resize`
    )
    resample: int = 3  # Pillow's number of the filter
    # Height and width of the centre crop; smaller images are padded with black.
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255  # multiplies grey levels
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    patch_size: int = (
        0  # above 0: images of any shape, as at most `max_patches` patches
    )
    max_patches: int = 0

    @property
    def output(self) -> tuple[int, int] | None:
        """Returns the height and width of processed images, or None if they differ."""
        return self.crop or self.resize

    def __call__(self, image: Any) -> dict[str, np.ndarray]:
        """Returns one RGB ``PIL.Image.Image`` (`open_image`) as arrays.

        Returns:
          ``pixels`` uint8 ``[height, width, 3]``; or, for images of any shape, ``pixels`` uint8
          ``[max_patches, patch * patch * 3]``, ``shapes`` int32 ``[2]`` (rows and columns of
          patches) and ``mask`` bool ``[max_patches]``.
        """
        if self.patch_size:
            return self._patches(image)
        size = self.resize
        if self.shortest:  # the other side is rounded down, as in torchvision
            short, long = sorted((image.height, image.width))
            size = (self.shortest, int(self.shortest * long / short))
            if image.width <= image.height:
                size = size[::-1]
        if size is not None:
            image = image.resize(size[::-1], resample=self.resample)
        if self.crop is not None:
            height, width = self.crop
            left = (image.width - width) // 2
            top = (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return {"pixels": np.asarray(image, np.uint8)}

    def of_side(self, side: int) -> ImageProcessor:
        """Returns the processor for squares of ``side`` pixels that crops the same share of an
        image."""
        output = self.output or (self.shortest, self.shortest)
        height, width = self.resize or output
        resize = crop = None
        if self.resize:
            rows = round(height * side / output[0])
            columns = round(width * side / output[1])
            resize = (rows, columns)
        if self.shortest or self.crop:
            crop = (side, side)
        return replace(
            self,
            resize=resize,
            shortest=round(self.shortest * side / min(output)),
            crop=crop,
        )

    def batch(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Returns several images, stacked."""
        return stack_images([self(image) for image in images])

    def prepare(self, image: Any) -> np.ndarray:
        """Returns an image of a conversation, uint8 ``[height, width, 3]``."""
        return self(image)["pixels"]

    def together(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the prepared images of one text, which do not depend on each other."""
        return list(images)

    def places(self, rows: Sequence[Sequence[np.ndarray]]) -> tuple[int, ...]:
        """Returns the number of images that the fullest row of prepared images needs."""
        return (max([1, *map(len, rows)]),)

    def rounded(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Returns ``places`` rounded up to few numbers, so that few programs are compiled."""
        return tuple(map(few_sizes, places))

    def arrays(
        self, rows: Sequence[Sequence[np.ndarray]], places: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Returns prepared images of rows, padded to a number of ``places``.

        Returns:
          ``pixels`` uint8 ``[rows, images, height, width, 3]``, black after a row's last image;
          ``images`` int32 ``[rows]``, the number of images in each row.
        """
        assert self.output is not None
        pixels = np.zeros((len(rows), *places, *self.output, 3), np.uint8)
        counts = np.zeros(len(rows), np.int32)
        for number, row in enumerate(rows):
            counts[number] = len(row)
            for place, image in enumerate(row):
                pixels[number, place] = image
        return {"pixels": pixels, "images": counts}

    def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model's ``encode_images``: normalised images and their
        numbers."""
        return self.normalise(batch["pixels"]), batch["images"]

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """Converts uint8 pixels or patches ``[..., channels or patch * patch * channels]`` to
        normalised float32."""
        return normalise_pixels(pixels, self.mean, self.std, self.scale)

    def _patches(self, image: Any) -> dict[str, np.ndarray]:
        p = self.patch_size
        height, width = _fitting(image.height, image.width, p, self.max_patches)
        pixels = np.asarray(
            image.resize((width, height), resample=self.resample), np.uint8
        )
        rows = height // p
        columns = width // p
        # [rows, p, columns, p, channels] -> [rows * columns, p * p * channels]
        patches = pixels.reshape(rows, p, columns, p, -1).transpose(0, 2, 1, 3, 4)
        patches = patches.reshape(rows * columns, -1)
        padded = np.zeros((self.max_patches, patches.shape[1]), np.uint8)
        padded[: len(patches)] = patches
        mask = np.arange(self.max_patches) < len(patches)
        return {
            "pixels": padded,
            "shapes": np.asarray([rows, columns], np.int32),
            "mask": mask,
        }


def read_processor(folder: Path) -> ImageProcessor | PatchProcessor | TileProcessor:
    """Returns the processor of a Hugging Face folder.

    Raises:
      NaloraError: the folder has none, its kind is not known, or a field has a wrong type.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        way = "AutoImageProcessor.from_pretrained(model).save_pretrained(folder)"
        where = str(folder / _FILES[0])
        remedy = f"save it with transformers: {way}"
        raise NaloraError(
            where, expected="the file", found="nothing of that name", remedy=remedy
        )
    raw = read_json(path)
    where = str(path)
    raw = raw.get("image_processor", raw)
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or ""
    base_kind = str(kind).removesuffix("Fast").removesuffix("Pil")
    if base_kind not in DEFAULTS:
        expected = f"one of {', '.join(DEFAULTS)}"
        raise NaloraError(
            f"{where}: image_processor_type", expected=expected, found=repr(kind)
        )
    f = Fields(raw, DEFAULTS[base_kind], where)
    # Of images of any shape it pads batches, which have other places here.
    refused = ["do_pan_and_scan"]
    if base_kind not in _VARIABLE:
        refused.append("do_pad")
    for name in refused:
        f.refuse(name, "set it to false in the file, as the model's own is")
    scale = 1.0
    if f.flag("do_rescale"):
        scale = f.number("rescale_factor")
    values: dict[str, Any] = {
        "resample": f.integer("resample", low=0, high=_HAMMING),
        "scale": scale,
    }
    if f.flag("do_normalize"):
        values |= {"mean": _channels(f, "image_mean"), "std": _channels(f, "image_std")}
    if base_kind in _VARIABLE:
        reader, _ = _VARIABLE[base_kind]
        settings = {"mean": (0.0,) * 3, "std": (1.0,) * 3} | values
        sized: PatchProcessor | TileProcessor = reader(f, settings)
        return sized
    if base_kind == "Siglip2ImageProcessor":
        values["patch_size"] = f.integer("patch_size", high=2**10)
        values["max_patches"] = f.integer("max_num_patches")
        return ImageProcessor(**values)
    if f.flag("do_resize"):
        values["resize"], values["shortest"] = _size(f, "size")
    if f.get("do_center_crop"):
        values["crop"] = _size(f, "crop_size")[0]
    return ImageProcessor(**values)


def read_sized_processor(folder: Path) -> ImageProcessor:
    """Returns the processor of a folder whose model reads images of one size.

    Raises:
      NaloraError: as `read_processor`, or the processor is one of patches or tiles.
    """
    processor = read_processor(folder)
    if not isinstance(processor, ImageProcessor):
        raise NaloraError(
            f"{folder}: image processor",
            expected="a processor of images of one size",
            found="one of patches or tiles",
            remedy="copy the processor's file from the model that the weights are from",
        )
    return processor


def _size(f: Fields, name: str) -> tuple[tuple[int, int] | None, int]:
    """Returns height and width, or None and the length of the shorter side."""
    value = f.get(name)
    square = name == "crop_size" or f.get("default_to_square") is True
    if not isinstance(value, Mapping):
        value = {"shortest_edge": value}
    sides = Fields(value, {}, f"{f.where}: {name}")
    if set(value) == {"shortest_edge"}:
        side = sides.integer("shortest_edge", high=2**14)
        if square:
            return (side, side), 0
        return None, side
    if not {"height", "width"} <= set(value):
        raise f.error(name, "height and width, or shortest_edge", str(value)[:60])
    height = sides.integer("height", high=2**14)
    width = sides.integer("width", high=2**14)
    return (height, width), 0


def stack_images(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of several images, stacked by name."""
    batch = {}
    for name in rows[0]:
        batch[name] = np.stack([row[name] for row in rows])
    return batch


def _channels(f: Fields, name: str) -> tuple[float, ...]:
    values = f.items(name, 3, (int, float))
    least = 0.0 if name == "image_std" else -_LARGEST
    if (
        values is None
        or not all(least <= v <= _LARGEST for v in values)
        or (least == 0 and 0 in values)
    ):
        raise f.error(
            name, "three finite numbers (above 0 for image_std)", str(values)[:80]
        )
    return tuple(float(v) for v in values)


def _fitting(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Returns the largest size of whole patches, near the aspect ratio, with at most ``most``.

    It bisects the scale to the precision of SigLIP 2's processor, because the result depends on it.
    """

    def sized(factor: float) -> tuple[int, int]:
        return tuple(
            max(patch, math.ceil(side * factor / patch) * patch)
            for side in (height, width)
        )  # type: ignore[return-value]

    precision = 1e-5
    low = precision / 10
    high = 100.0
    while high - low >= precision:
        middle = (low + high) / 2
        tall, wide = sized(middle)
        if (tall / patch) * (wide / patch) <= most:
            low = middle
        else:
            high = middle
    return sized(low)


def resize_square(image: Any, side: int) -> Any:
    """Returns an RGB image resized to a square of ``side`` pixels, for reports."""
    return image.resize((side, side), resample=pillow().Resampling.BICUBIC)


_MULTIPLE = 8  # lengths are rounded up to it, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """The tokenizer of a text encoder.

    Args:
      backend: its post-processor adds begin and end tokens.
      max_length: tokens of the longest text; longer texts are cut but keep their end token.
      pad_id: the padding token.
      fixed: pad every row to ``max_length`` tokens, as in the training of SigLIP.
      left: pad on the left.
      lowercase: convert texts to lower case first (SigLIP 2).
    """

    backend: tokenizers.Tokenizer
    max_length: int
    pad_id: int
    fixed: bool = False
    left: bool = False
    lowercase: bool = False

    def __call__(
        self, texts: Sequence[str], *, length: int = 0
    ) -> dict[str, np.ndarray]:
        """Returns ``tokens`` int32 and ``token_weights`` float32, ``[texts, length]``.

        The weight of padding is 0.

        Args:
          texts: any number of texts.
          length: tokens per row; by default the longest text's, rounded up to a multiple of 8, at
            most ``max_length``.
        """
        if self.lowercase:
            texts = [text.lower() for text in texts]
        self.backend.enable_truncation(length or self.max_length)
        rows = self.backend.encode_batch(list(texts))
        longest = max((len(row) for row in rows), default=1)
        if self.fixed:
            longest = self.max_length
        length = length or min(self.max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
        direction = "right"
        if self.left:
            direction = "left"
        for row in rows:
            row.pad(length, direction=direction, pad_id=self.pad_id)
        return {
            "tokens": np.array([row.ids for row in rows], np.int32),
            "token_weights": np.array([row.attention_mask for row in rows], np.float32),
        }


def read_text_tokenizer(
    folder: Path, *, max_length: int, vocab_size: int, fixed: bool = False
) -> TextTokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    Raises:
      NaloraError: tokenizer.json is missing or damaged, has more tokens than the embedding has
        rows, or defines no padding token.
    """
    path = folder / "tokenizer.json"
    backend = read_backend(path)
    settings = read_settings(folder)
    if backend.get_vocab_size() > vocab_size:
        expected = f"at most {vocab_size} tokens, the rows of the embedding"
        raise NaloraError(str(path), expected=expected, found=backend.get_vocab_size())
    pad_id = backend.token_to_id(token_text(settings.get("pad_token")))
    if pad_id is None:
        where = str(folder / "tokenizer_config.json")
        found = repr(settings.get("pad_token"))
        remedy = "set pad_token to a token of the vocabulary"
        raise NaloraError(where, expected="pad_token", found=found, remedy=remedy)
    return TextTokenizer(
        backend,
        max_length,
        pad_id,
        fixed=fixed,
        left=settings.get("padding_side") == "left",
        lowercase=settings.get("tokenizer_class") == "Siglip2Tokenizer",
    )
