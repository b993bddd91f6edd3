"""Images come out as transformers' own processors make them, to one grey level."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

from nalora_jax.data.images.files import read_processor
from nalora_jax.errors import NaloraError

CROP, CHANNELS = {"height": 61, "width": 50}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
CASES = {
    "CLIP": ("CLIP", {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}),
    "CLIP's defaults": ("CLIP", {}),
    "crop larger than the image": ("CLIP", {"do_resize": False, "crop_size": CROP}),
    "SigLIP": ("Siglip", {"size": {"height": 17, "width": 31}, "resample": 1}),
    "ViT": ("ViT", {"size": 33, "do_normalize": False}),
    "DINOv2": ("Bit", {"size": 40, **CHANNELS}),
    "nearest, no scale": ("ViT", {"resample": 0, "do_rescale": False, "do_normalize": False}),
}
SIZES = ((37, 64), (64, 37), (301, 207))


def processor(kind):
    return getattr(transformers, f"{kind}ImageProcessorPil")


def picture(width, height):
    rng = np.random.default_rng(width)
    coarse = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("case", "side", "scaled"),
    [
        ("CLIP", 10, {"size": {"shortest_edge": 12}, "crop_size": {"height": 10, "width": 10}}),
        ("ViT", 21, {"size": 21, "do_normalize": False}),
    ],
)
def test_another_size_is_another_size_in_the_file(tmp_path, case, side, scaled):
    """The same share is cut off; pixels are those of transformers with the numbers that the file would have."""
    kind, settings = CASES[case]
    processor(kind)(**settings).save_pretrained(tmp_path)
    theirs, image = processor(kind)(**(settings | scaled), do_rescale=False), picture(301, 207)
    theirs.do_normalize = False
    expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = read_processor(tmp_path).of_side(side)(image)["pixels"]
    assert found.shape == (side, side, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(tmp_path, case):
    name, settings = CASES[case]
    theirs = processor(name)(**settings)
    theirs.save_pretrained(tmp_path)
    ours = read_processor(tmp_path)
    for size in SIZES:
        image = picture(*size)
        expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        found = np.asarray(ours.normalise(jnp.asarray(ours(image)["pixels"])))
        assert found.shape == expected.shape
        assert ours.output == expected.shape[:2]
        levels = np.abs(found - expected) * np.asarray(ours.std) / ours.scale
        assert levels.max() < 1.0, size


def test_patches_of_any_shape_are_those_of_transformers(tmp_path):
    theirs = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=40)
    theirs.save_pretrained(tmp_path)
    ours = read_processor(tmp_path)
    for size in (*SIZES, (5, 300)):
        image = picture(*size)
        expected = theirs(image, return_tensors="np")
        found = ours(image)
        np.testing.assert_array_equal(found["shapes"], expected["spatial_shapes"][0])
        np.testing.assert_array_equal(found["mask"], expected["pixel_attention_mask"][0].astype(bool))
        pixels = np.asarray(ours.normalise(jnp.asarray(found["pixels"])))[found["mask"]]
        levels = np.abs(pixels - expected["pixel_values"][0][found["mask"]]) * 0.5 * 255
        assert levels.max() < 1.0, size


def test_bad_files_are_named(tmp_path):
    with pytest.raises(NaloraError, match="preprocessor_config.json"):
        read_processor(tmp_path)
    good = {"image_processor_type": "CLIPImageProcessor"}
    for change, message in (
        ({"image_processor_type": "FuyuImageProcessor"}, "image_processor_type"),
        ({"size": {"longest": 3}}, "size"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"image_mean": [10**400, 0.5, 0.5]}, "image_mean"),
        ({"resample": 9}, "resample"),
        ({"crop_size": {"height": -3, "width": 4}}, "height"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | change))
        with pytest.raises(NaloraError, match=message):
            read_processor(tmp_path)
    # What transformers 5 writes beside a tokenizer: the same object inside another.
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": good}))
    assert read_processor(tmp_path).output == (224, 224)
