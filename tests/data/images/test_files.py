"""Images are opened or refused by name, and processed as transformers does, to one grey level; so
are texts."""

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from nalora_jax.data.images.image_files import open_image, read_processor, read_text_tokenizer
from nalora_jax.errors import NaloraError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width=20, height=12):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def pixels_of(source):
    return np.asarray(open_image(source))


def test_transparency_becomes_white_and_grey_becomes_rgb_within_the_limit_of_pixels():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 2), (10, 20, 30, 255))
    found = pixels_of(encoded(clear))
    assert (found[2, 1] == (10, 20, 30)).all()
    assert (found[0, 0] == 255).all()
    assert open_image(encoded(noise().convert("L"))).mode == "RGB"
    palette = noise().convert("P")
    palette.info["transparency"] = 0
    assert open_image(encoded(palette)).mode == "RGB"
    with pytest.raises(NaloraError, match="at most 100 pixels"):
        open_image(encoded(noise()), max_pixels=100)


@pytest.mark.parametrize(
    ("kind", "orientation"), [*(("JPEG", i) for i in range(1, 9)), ("TIFF", 6)]
)
def test_photos_are_turned_upright_as_transformers_turns_them(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / "photo", kind, exif=exif)
    upright = load_image(str(tmp_path / "photo"))
    assert upright.size == ((12, 20) if orientation > 4 else (20, 12))
    np.testing.assert_array_equal(pixels_of(tmp_path / "photo"), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    values = np.random.default_rng(0).integers(0, 2**16, (4, 6), dtype=np.uint16)
    found = pixels_of(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


GIF = encoded(noise(), "GIF")
MOVING = encoded(noise(), "GIF", save_all=True, append_images=[noise().rotate(180)])
REFUSED = {
    "whole numbers of 32 bits": (encoded(Image.new("I", (4, 4)), "TIFF"), "expected 8 or 16 bits per channel"),
    "floats": (encoded(Image.new("F", (4, 4)), "TIFF"), "expected 8 or 16 bits per channel"),
    "a decompression bomb, by its header": (GIF[:6] + b"\xff" * 4 + GIF[10:], "expected at most 50,000,000 pixels"),
    "half a JPEG": (encoded(noise(200, 100), "JPEG")[:1000], "expected a whole image"),
    "a text": (b"not an image at all", "expected a whole image"),
    "a moving image": (MOVING, "expected a still image, found 2 frames"),
    "a line": (encoded(Image.new("RGB", (1000, 2))), "sides that differ by at most 100 times"),
    "an absent file": (Path("none.png"), "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_cannot_be_read_are_refused_by_name(case):
    image, message = REFUSED[case]
    with pytest.raises(NaloraError, match=f"photo.img: .*{message}"):
        open_image(image, "photo.img")


CROP, CHANNELS = (
    {"height": 61, "width": 50},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
)
CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
CLIP_OF_10 = {"size": {"shortest_edge": 12}, "crop_size": {"height": 10, "width": 10}}
CASES = {
    "CLIP": ("CLIP", CLIP),
    "CLIP's defaults": ("CLIP", {}),
    "crop larger than the image": ("CLIP", {"do_resize": False, "crop_size": CROP}),
    "CLIP of another size": ("CLIP", CLIP, 10, CLIP_OF_10),
    "ViT of another size": ("ViT", {"size": 33}, 21, {"size": 21}),
    "SigLIP": ("Siglip", {"size": {"height": 17, "width": 31}, "resample": 1}),
    "ViT": ("ViT", {"size": 33, "do_normalize": False}),
    "DINOv2": ("Bit", {"size": 40, **CHANNELS}),
    "nearest, no scale": ("ViT", {"resample": 0, "do_rescale": False, "do_normalize": False}),
}
SIZES = ((37, 64), (64, 37), (301, 207))


def saved(folder, kind, **settings):
    """Transformers' processor and ours, from the file that it writes."""
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    theirs.save_pretrained(folder)
    return theirs, read_processor(folder)


def picture(width, height):
    coarse = np.random.default_rng(width).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(tmp_path, case):
    kind, settings, *other = CASES[case]
    theirs, ours = saved(tmp_path, kind, **settings)
    if other:  # the numbers that the file of this size would have
        theirs, _ = saved(tmp_path, kind, **(settings | other[1]))
        ours = ours.of_side(other[0])
    for size in SIZES:
        image = picture(*size)
        expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        found = np.asarray(ours.normalise(jnp.asarray(ours(image)["pixels"])))
        assert found.shape == expected.shape
        assert ours.output == expected.shape[:2]
        levels = np.abs(found - expected) * np.asarray(ours.std) / ours.scale
        assert levels.max() < 1.0, size


def test_patches_of_any_shape_are_those_of_transformers(tmp_path):
    theirs, ours = saved(tmp_path, "Siglip2", patch_size=8, max_num_patches=40)
    for size in (*SIZES, (5, 300)):
        image = picture(*size)
        expected, found = theirs(image, return_tensors="np"), ours(image)
        np.testing.assert_array_equal(found["shapes"], expected["spatial_shapes"][0])
        np.testing.assert_array_equal(
            found["mask"], expected["pixel_attention_mask"][0].astype(bool)
        )
        pixels = np.asarray(ours.normalise(jnp.asarray(found["pixels"])))[found["mask"]]
        levels = np.abs(pixels - expected["pixel_values"][0][found["mask"]]) * 0.5 * 255
        assert levels.max() < 1.0, size


def test_bad_processor_files_are_named(tmp_path):
    with pytest.raises(NaloraError, match="preprocessor_config.json"):
        read_processor(tmp_path)
    good = {"image_processor_type": "CLIPImageProcessor"}
    for change, message in (
        ({"image_processor_type": "FuyuImageProcessor"}, "image_processor_type"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"crop_size": {"height": -3, "width": 4}}, "height"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | change))
        with pytest.raises(NaloraError, match=message):
            read_processor(tmp_path)
    # What transformers 5 writes beside a tokenizer: the same object inside another.
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": good}))
    assert read_processor(tmp_path).output == (224, 224)


def assert_same(folder, texts, *, length, padding=True, **options):
    """Returns our tokenizer of a folder, whose tokens are those of transformers."""
    ours = read_text_tokenizer(folder, max_length=length, **options)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(
        texts, truncation=True, return_tensors="np", padding=padding, max_length=length
    )
    found = ours(texts, length=expected["input_ids"].shape[1])
    np.testing.assert_array_equal(found["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(found["token_weights"], expected["attention_mask"])
    return ours


def test_texts_become_the_tokens_of_transformers(dual_folder, tmp_path):
    """Random words, and byte-level BPE that ends words and WordPiece with its normaliser, from
    their files."""
    texts = ["a photo of a red square", "A Green circle", "", "dress " * 30]
    assert_same(dual_folder("clip"), texts, length=12, vocab_size=40)
    ours = assert_same(
        dual_folder("siglip"), texts, length=12, vocab_size=40, fixed=True, padding="max_length"
    )
    assert ours(texts)["tokens"].shape == (4, 12)
    letters = "abcdefghijklmnopqrstuvwxyz!,"
    words = [
        *letters,
        *(f"{c}</w>" for c in letters),
        "ca",
        "cat</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    special = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    pieces = [*special, *letters, *(f"##{c}" for c in letters), "cat", "##ty"]
    words, pieces = ({word: i for i, word in enumerate(listed)} for listed in (words, pieces))
    clip = transformers.CLIPTokenizer(vocab=words, merges=[("c", "a"), ("ca", "t</w>")])
    for name, theirs in (("clip", clip), ("bert", transformers.BertTokenizer(vocab=pieces))):
        theirs.save_pretrained(tmp_path / name)
        texts = ["Cat, catty!", "a CAT sat", "é cat"]
        assert_same(tmp_path / name, texts, length=16, vocab_size=100)


def test_bad_folders_of_text_encoders_are_named(dual_folder, tmp_path):
    with pytest.raises(NaloraError, match="rows of the embedding"):
        read_text_tokenizer(dual_folder("clip"), max_length=8, vocab_size=5)
    shutil.copy(dual_folder("clip") / "tokenizer.json", tmp_path)
    settings = json.loads((dual_folder("clip") / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[NONE]"}))
    with pytest.raises(NaloraError, match="pad_token"):
        read_text_tokenizer(tmp_path, max_length=8, vocab_size=40)
