"""Patches of images of any shape, against transformers' processor of Qwen2-VL (Pillow)."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from nalora_jax.common.fields import Fields
from nalora_jax.data.chat_templates import ImageLayout
from nalora_jax.data.images.patches import PATCH_PROCESSORS, PatchProcessor
from nalora_jax.errors import NaloraError

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Width and height: thin, tiny, huge, square, and next to the limits of rounding.
SIZES = [(1, 150), (200, 1), (3, 3), (28, 28), (27, 29), (14, 14), (42, 70), (640, 480), (333, 777)]
SIZES += [(2000, 1500), (1200, 31), (57, 1000), (41, 43), (42, 42), (98, 56), (1, 1), (56, 57)]


def make_processor(**fields) -> PatchProcessor:
    read, defaults = PATCH_PROCESSORS["Qwen2VLImageProcessor"]
    values = {"mean": tuple(CLIP["image_mean"]), "std": tuple(CLIP["image_std"])}
    return read(Fields({"do_resize": True} | fields, defaults, "preprocessor_config.json"), values)


def draw_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 7919 + height).integers(
        0, 256, (height, width, 3), np.uint8
    )
    return Image.fromarray(pixels)


@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 40)], ids=str)
@pytest.mark.parametrize(("width", "height"), SIZES, ids=str)
def test_patches_are_those_of_transformers(width, height, limits):
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    ours = make_processor(size=size)
    theirs = Qwen2VLImageProcessorPil(size=size)
    image = draw_image(width, height)
    patches = ours.prepare(image)
    expected = theirs(images=[image], return_tensors="np")
    assert patches.grids[0] == tuple(expected["image_grid_thw"][0, 1:])
    assert ours.layouts([(height, width)]) == ours.layouts_of_prepared([patches])
    # [patches, channels * frames * patch * patch] -> [patches, patch, patch, channels] of a frame
    frames = expected["pixel_values"].reshape(-1, 3, 2, 14, 14)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    squares = frames[:, :, 0].transpose(0, 2, 3, 1).reshape(len(patches.pixels), -1)
    np.testing.assert_allclose(ours.normalise(jnp.asarray(patches.pixels)), squares, atol=2e-5)


def test_a_lower_limit_takes_fewer_tokens():
    processor = make_processor()
    assert processor.with_limits(0, 10**9) == processor
    lower = processor.with_limits(0, 28 * 28 * 6)
    assert lower.layouts([(480, 640)]) == [ImageLayout(4)]  # 2 by 2, of at most 6
    assert lower.min_pixels == processor.min_pixels
    assert processor.with_limits(0, 1).layouts([(480, 640)]) == [ImageLayout(1)]


def test_a_higher_minimum_takes_more_tokens():
    processor = make_processor()
    assert processor.layouts([(56, 56)]) == [ImageLayout(4)]
    assert processor.with_limits(28 * 28 * 9, 10**9).layouts([(56, 56)]) == [ImageLayout(9)]
    with pytest.raises(NaloraError, match="--vision.min-pixels: expected at most 784"):
        processor.with_limits(1000, 784)


def test_rows_hold_the_patches_of_their_images_one_after_another():
    processor = make_processor(size={"shortest_edge": 784, "longest_edge": 784 * 4})
    first, second = (processor.prepare(draw_image(*size)) for size in ((56, 28), (28, 56)))
    rows = [[first, second], [], [second]]
    images, patches = processor.places(rows)
    assert (images, patches) == (2, 16)
    arrays = processor.arrays(rows, (images, patches))
    assert arrays["grids"].tolist() == [[[2, 4], [4, 2]], [[0, 0], [0, 0]], [[4, 2], [0, 0]]]
    np.testing.assert_array_equal(arrays["patches"][0, 8:], second.pixels)
    np.testing.assert_array_equal(arrays["patches"][2, :8], second.pixels)
    assert not arrays["patches"][1].any()
    normalised, grids = processor.inputs(
        {name: jnp.asarray(value) for name, value in arrays.items()}
    )
    assert normalised.shape == (3, 16, 14 * 14 * 3)
    assert grids.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_resize": False}, "do_resize.*expected true.*whole squares"),
        (
            {"size": {"shortest_edge": 9000, "longest_edge": 8000}},
            "size.*longest_edge of at least 9000 pixels",
        ),
    ],
    ids=str,
)
def test_settings_of_processors_are_checked(fields, message):
    with pytest.raises(NaloraError, match=message):
        make_processor(**fields)


def test_a_thin_image_is_refused():
    with pytest.raises(NaloraError, match="sides that differ by at most 200 times, found 201 x 1"):
        make_processor().prepare(draw_image(201, 1))
