"""Image processors of all families on 60 pictures of odd shapes and formats, against transformers'
with Pillow: pixels, numbers of tokens and text of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from nalora_jax.data.images.image_files import image_size, open_image, read_processor

transformers = pytest.importorskip("transformers")
models = transformers.models

# Width and height: thin, tiny, square, next to limits of rounding, and large for these processors.
SIZES = [(1, 1), (1, 60), (60, 1), (2, 90), (90, 2), (3, 3), (5, 7), (8, 8), (16, 16), (15, 17)]
SIZES += [(17, 15), (16, 32), (32, 16), (31, 33), (24, 40), (40, 24), (47, 49), (48, 48), (64, 64)]
SIZES += [
    (63, 65),
    (20, 70),
    (70, 20),
    (9, 100),
    (100, 9),
    (96, 33),
    (33, 96),
    (128, 64),
    (64, 128),
]
SIZES += [(99, 101), (150, 30), (30, 150), (120, 120), (200, 3), (3, 200), (180, 121), (301, 77)]
SIZES += [(77, 301), (500, 499), (640, 480), (900, 700)]


def draw(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Noise, uint8 ``[height, width, channels]``."""
    rng = np.random.default_rng(width * 7919 + height)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def write_pictures(folder: Path) -> list[Path]:
    """60 pictures: 40 sizes, eight EXIF orientations, and twelve formats."""
    paths = []

    def save(image: Image.Image, ending: str = "png", **options: Any) -> None:
        path = folder / f"{len(paths)}.{ending}"
        image.save(path, **options)
        paths.append(path)

    for size in SIZES:
        save(Image.fromarray(draw(*size)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(Image.fromarray(draw(41, 22)), "jpg", exif=exif)
    colours = Image.fromarray(draw(37, 52))
    save(Image.fromarray(draw(30, 41, 4)))  # transparent
    save(Image.fromarray(draw(50, 19, 2), "LA"))
    save(colours.convert("L"))
    save(colours.convert("1"))
    save(colours.convert("P"))
    save(colours.convert("P"), transparency=3)
    save(colours.convert("L"), transparency=90)
    save(colours.convert("CMYK"), "jpg")
    save(colours, "webp", lossless=True)
    save(colours.convert("P"), "gif")
    deep = np.random.default_rng(1).integers(0, 2**16, (33, 29)).astype(np.uint16)
    save(Image.fromarray(deep))
    save(Image.fromarray(deep), "tif")
    return paths


def as_given(path: Path) -> Image.Image:
    """The picture that transformers' processor is given: upright, and with 8 bits.

    transformers clips 16 bits to white; this library takes the upper 8.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.copy()


@dataclass(frozen=True)
class Case:
    """A family's processor of transformers, and how its result is compared."""

    kind: Any
    settings: dict[str, Any]
    ours: Callable[[Any, Any], tuple[np.ndarray, Any]]  # pixels [..., 3], and further results
    theirs: Callable[[Any, Any], tuple[np.ndarray, Any]]  # the same, normalised
    given: dict[str, Any] = field(default_factory=dict)  # fields of our processor from elsewhere


def channels_last(images: np.ndarray) -> np.ndarray:
    """``[..., 3, height, width]`` -> ``[..., height, width, 3]``."""
    return np.moveaxis(np.asarray(images), -3, -1)


def of_one_size(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    return processor(image)["pixels"], None


def one_size_of_theirs(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    return channels_last(processor(image, return_tensors="np")["pixel_values"][0]), None


def padded_patches(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    arrays = processor(image)
    return arrays["pixels"][arrays["mask"]].reshape(-1, 3), arrays["shapes"].tolist()


def padded_patches_of_theirs(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    made = processor(image, return_tensors="np")
    mask = made["pixel_attention_mask"][0].astype(bool)
    return made["pixel_values"][0][mask].reshape(-1, 3), made["spatial_shapes"][0].tolist()


def packed_patches(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    patches = processor.prepare(image)
    (layout,) = processor.layouts([(image.height, image.width)])
    assert processor.layouts_of_prepared([patches]) == [layout]
    return patches.pixels.reshape(-1, 3), (*patches.grids, layout.tokens)


def qwen_patches(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    made = processor(image, return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    # [patches, channels, frames, patch, patch] -> [patches, patch, patch, channels]
    squares = made["pixel_values"].reshape(-1, 3, 2, 4, 4)[:, :, 0]
    return channels_last(squares).reshape(-1, 3), ((rows, columns), rows * columns // 4)


def pixtral_patches(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    """With squares of 2 by 2 patches, as Mistral 3's processor asks for."""
    made = processor(image, patch_size=8, return_tensors="np")
    height, width = made["image_sizes"][0]
    return in_squares(channels_last(made["pixel_values"][0]), (height, width))


def in_squares(pixels: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """Pixels in the order of patches of 4 by 4 in squares of 2 by 2, and the grid and tokens."""
    rows = size[0] // 8
    columns = size[1] // 8
    squares = pixels.reshape(rows, 2, 4, columns, 2, 4, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return squares.reshape(-1, 3), ((2 * rows, 2 * columns), rows * columns)


def tiles(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    made = processor.prepare(image)
    (layout,) = processor.layouts([(image.height, image.width)])
    assert processor.layouts_of_prepared([made]) == [layout]
    return made.pixels, layout


def split_tiles(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    made = processor(image, return_row_col_info=True, return_tensors="np")
    rows, columns = (int(made[name][0][0]) for name in ("rows", "cols"))
    tile = 4 if rows * columns else 0
    return channels_last(made["pixel_values"][0]), (4, rows, columns, tile)


def next_tiles(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    """Tokens are those of the model's processor for a tower without a class token."""
    made = processor(image, return_tensors="np")
    like = models.llava_next.processing_llava_next.LlavaNextProcessor
    return anyres(processor, made, like, patch_size=4, num_additional_image_tokens=0)


def onevision_tiles(processor: Any, image: Any) -> tuple[np.ndarray, Any]:
    made = processor(image, return_tensors="np")
    like = models.llava_onevision.processing_llava_onevision.LlavaOnevisionProcessor
    return anyres(processor, made, like, num_image_tokens=16, vision_aspect_ratio="anyres_max_2")


def anyres(processor: Any, made: Any, like: Any, **fields: Any) -> tuple[np.ndarray, Any]:
    size = made["image_sizes"][0].tolist()
    whole = object.__new__(like)
    vars(whole).update(image_processor=processor, **fields)
    tokens = whole._get_number_of_features(*size, 16, 16)
    tall, wide = transformers.image_processing_utils.select_best_resolution(
        size, processor.image_grid_pinpoints
    )
    return channels_last(made["pixel_values"][0]), (tokens, tall // 16, wide // 16, 0)


SQUARE = {"height": 16, "width": 16}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
MANY = [[16 * tall, 16 * wide] for tall in range(1, 5) for wide in range(1, 5)]
NEXT = {"size": {"shortest_edge": 16}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS}
ONEVISION = {"size": SQUARE, "image_grid_pinpoints": MANY}
SPLIT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
CLIP = {"size": {"shortest_edge": 16}, "crop_size": SQUARE}
FIXED = (of_one_size, one_size_of_theirs)
RGB = {"do_convert_rgb": True}  # no default of these two
SIGLIP2 = {"patch_size": 4, "max_num_patches": 16} | RGB
QWEN = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
CASES = {
    "clip": Case(transformers.CLIPImageProcessorPil, CLIP, *FIXED),
    "siglip": Case(transformers.SiglipImageProcessorPil, {"size": SQUARE}, *FIXED),
    "vit": Case(transformers.ViTImageProcessorPil, {"size": SQUARE} | RGB, *FIXED),
    "gemma3": Case(
        models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil,
        {"size": SQUARE},
        *FIXED,
    ),
    "siglip2": Case(
        transformers.Siglip2ImageProcessorPil, SIGLIP2, padded_patches, padded_patches_of_theirs
    ),
    "qwen": Case(
        models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil,
        QWEN,
        packed_patches,
        qwen_patches,
    ),
    "pixtral": Case(
        models.pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil,
        {"size": {"longest_edge": 200}, "patch_size": {"height": 4, "width": 4}},
        packed_patches,
        pixtral_patches,
        {"merge": 2},
    ),
    "idefics3": Case(
        transformers.Idefics3ImageProcessorPil, SPLIT, tiles, split_tiles, {"tokens": 4}
    ),
    "idefics3 whole": Case(
        transformers.Idefics3ImageProcessorPil,
        SPLIT | {"do_image_splitting": False},
        tiles,
        split_tiles,
        {"tokens": 4},
    ),
    "smolvlm": Case(
        models.smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil,
        SPLIT | {"size": {"longest_edge": 36}},
        tiles,
        split_tiles,
        {"tokens": 4},
    ),
    "llava_next": Case(
        transformers.LlavaNextImageProcessorPil, NEXT, tiles, next_tiles, {"tokens": 16, "grid": 4}
    ),
    "llava_onevision": Case(
        transformers.LlavaOnevisionImageProcessorPil,
        ONEVISION,
        tiles,
        onevision_tiles,
        {"tokens": 16, "grid": 4, "most_tiles": 2},
    ),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pictures_are_prepared_as_by_transformers(case: Case, paths, tmp_path) -> None:
    """Sizes, tiles and tokens are equal; normalised pixels differ by at most 1e-5."""
    assert len(paths) == 60
    theirs = case.kind(**case.settings)
    theirs.save_pretrained(tmp_path)
    ours = replace(read_processor(tmp_path), **case.given)
    actual = []
    expected = []
    for path in paths:
        image = open_image(path)
        assert (image.height, image.width) == image_size(path, path.name)
        pixels, found = case.ours(ours, image)
        reference, results = case.theirs(theirs, as_given(path))
        assert found == results, path.name
        assert pixels.shape == reference.shape, path.name
        actual.append(pixels.reshape(-1, 3))
        expected.append(reference.reshape(-1, 3))
    normalised = ours.normalise(np.concatenate(actual))
    np.testing.assert_allclose(normalised, np.concatenate(expected), atol=1e-5)
