"""Images by folder and by list: labels, captions, splits, what is broken, and batches as functions
of their number."""

import json

import numpy as np
import pytest
from PIL import Image

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.image_files import ImageProcessor, open_image
from nalora_jax.data.images.opened import (
    ImageData,
    augment_image,
    crop_box,
    draw_shots,
    generator,
    open_images,
)
from nalora_jax.errors import NaloraError


@pytest.fixture
def picture_folder(tmp_path):
    """``picture_folder(cat=3, dog=5)`` makes so many pictures in a subfolder for each name."""

    def make(**counts):
        for name, count in counts.items():
            (tmp_path / "pictures" / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((i, len(name), ord(name[0])))
                pixels = rng.integers(0, 256, (10 + i, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
        return tmp_path / "pictures"

    return make


PLAIN = VisionConfig()


def images_of(dataset, split="train", fields=PLAIN):
    return open_images(DataConfig(dataset=str(dataset)), fields, split)


def test_a_folder_per_class(picture_folder):
    folder = picture_folder(cat=3, dog=2)
    source = images_of(folder)
    assert source.classes() == ("cat", "dog")
    np.testing.assert_array_equal(source.labels(source.classes()), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(source.labels(("dog", "cat")), [1, 1, 1, 0, 0])
    assert source.where(4) == "dog/1.png"
    tail = images_of(folder, "train[60%:]")
    assert [tail.where(i) for i in range(len(tail))] == ["dog/0.png", "dog/1.png"]
    assert source.fingerprint != tail.fingerprint
    assert tail.spans == [("train", 3, 5)]
    assert open_image(source.image(*source.read([4]), "")).size == (14, 11)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_of_captions(picture_folder, form):
    folder, texts = picture_folder(cat=2), ("a cat, asleep", 'the "other" cät')
    rows = [{"file_name": f"cat/{i}.png", "caption": text} for i, text in enumerate(texts)]
    text = 'file_name,caption\ncat/0.png,"a cat, asleep"\ncat/1.png,"the ""other"" cät"\n'
    if form == "jsonl":
        text = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / f"captions.{form}").write_text(text, encoding="utf-8")
    for dataset in (folder, folder / f"captions.{form}"):
        source = images_of(dataset)
        assert source.captions([1, 0]) == [texts[1], texts[0]]
        assert open_image(source.image(*source.read([0]), "")).size == (14, 10)


def test_a_list_cannot_reach_other_files(picture_folder):
    folder = picture_folder(cat=1)
    (folder.parent / "secret.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    (folder / "captions.csv").write_text("file_name,caption\n../secret.png,oh\n")
    source = images_of(folder)
    with pytest.raises(NaloraError, match="a file below"):
        source.read([0])


def test_broken_images_are_named_and_left_out_or_refused(picture_folder, caplog):
    folder = picture_folder(cat=4)
    (folder / "cat" / "1.png").write_bytes(b"nothing of the kind")
    whole = (folder / "cat" / "2.png").read_bytes()
    (folder / "cat" / "2.png").write_bytes(whole[:60])
    indices = np.arange(4)
    np.testing.assert_array_equal(images_of(folder).readable(indices), [0, 3])
    assert [text.split(":")[1] for text in caplog.messages] == [" cat/1.png", " cat/2.png"]
    with pytest.raises(NaloraError, match=r"cat/[12]\.png"):
        images_of(folder, fields=VisionConfig(broken="error")).readable(indices)
    with pytest.raises(NaloraError, match="at least one record with readable images"):
        images_of(folder, fields=VisionConfig(max_pixels=10)).readable(indices)


def test_what_is_missing_is_named(picture_folder):
    folder = picture_folder(cat=1)
    source = images_of(folder)
    for message, read in {
        "expected a registered data set": lambda: images_of("nowhere"),
        "at least one image": lambda: images_of(folder / "cat"),
        "--vision.caption-field": lambda: source.captions([0]),
        "one of 1 classes": lambda: source.labels(("bird",)),
        "train": lambda: images_of(folder, "validation"),
    }.items():
        with pytest.raises(NaloraError, match=message):
            read()


PROCESSOR = ImageProcessor(resize=(12, 12))


def data(folder, *, seed=1, **vision):
    source = images_of(folder, fields=VisionConfig(**vision))
    labels, indices = source.labels(source.classes()), np.arange(len(source))
    options = {"batch_size": 4, "accumulate": 1, "rows": (0, 1, 2, 3), "workers": 0}
    return ImageData(source, indices, PROCESSOR, source.fields, seed, labels, **options)


def test_shots_are_nested_even_and_by_seed():
    labels = np.random.default_rng(0).integers(0, 3, 60)
    names = ("a", "b", "c")
    drawn = {n: draw_shots(labels, names, n, 7) for n in (1, 2, 8)}
    assert set(drawn[1]) < set(drawn[2]) < set(drawn[8])
    np.testing.assert_array_equal(np.bincount(labels[drawn[8]]), [8, 8, 8])
    assert set(drawn[8]) != set(draw_shots(labels, names, 8, 8))
    assert len(draw_shots(labels, names, 0, 7)) == len(draw_shots(labels, names, 1000, 7)) == 60
    with pytest.raises(NaloraError, match="class 'd'"):
        draw_shots(labels, (*names, "d"), 2, 7)


def test_batches_are_pure_and_every_epoch_holds_every_image(picture_folder):
    folder = picture_folder(cat=4, dog=4)
    batches = [data(folder).batch_at(row) for row in (0, 4)]
    assert batches[0]["pixels"].shape == (1, 4, 12, 12, 3)
    for name, values in data(folder).batch_at(0).items():
        np.testing.assert_array_equal(values, batches[0][name])
    np.testing.assert_array_equal(
        np.bincount(np.ravel([batch["labels"] for batch in batches])), [4, 4]
    )
    positions = {
        data(folder, **change).fingerprint for change in ({}, {"seed": 2}, {"augment": "flip"})
    }
    assert len(positions) == 3
    still = data(folder, augment="none").batch_at(0)["pixels"]
    assert not np.array_equal(np.sort(still.ravel()), np.sort(batches[0]["pixels"].ravel()))


def test_augmentation_keeps_what_it_promises():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    crop, flip, none = (VisionConfig(augment=a, crop_area=0.4) for a in ("crop", "flip", "none"))
    assert augment_image(image, none, generator(0)) is image
    flipped = {np.asarray(augment_image(image, flip, generator(0, i))).tobytes() for i in range(20)}
    assert flipped == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}
    assert augment_image(image, crop, generator(3)) == augment_image(image, crop, generator(3))
    shares = []
    for i in range(300):
        left, top, right, bottom = crop_box(60, 40, 0.4, generator(9, i))
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        shares.append((right - left) * (bottom - top) / 2400)
    assert min(shares) > 0.35
    assert np.std(shares) > 0.1
