"""Which images a run trains on, and that a batch is a pure function of its number."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.files import ImageProcessor
from nalora_jax.data.images.opened import ImageData, augmented, crop_box, draw_shots, generator, open_images
from nalora_jax.errors import NaloraError

PROCESSOR = ImageProcessor(resize=(12, 12))


def data(folder, *, rows=(0, 1, 2, 3), accumulate=1, seed=1, workers=0, **vision) -> ImageData:
    fields = VisionConfig(**vision)
    source = open_images(DataConfig(dataset=str(folder)), fields, "train")
    labels = source.labels(source.classes())
    return ImageData(
        source,
        np.arange(len(source)),
        PROCESSOR,
        fields,
        seed,
        labels,
        batch_size=4 * accumulate,
        accumulate=accumulate,
        rows=rows,
        workers=workers,
    )


def test_shots_are_nested_even_and_by_seed() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 60)
    names = ("a", "b", "c")
    drawn = {n: draw_shots(labels, names, n, 7) for n in (1, 2, 8)}
    assert set(drawn[1]) < set(drawn[2]) < set(drawn[8])
    np.testing.assert_array_equal(np.bincount(labels[drawn[8]]), [8, 8, 8])
    assert set(drawn[8]) != set(draw_shots(labels, names, 8, 8))
    assert len(draw_shots(labels, names, 0, 7)) == 60
    np.testing.assert_array_equal(
        np.bincount(labels[draw_shots(labels, names, 1000, 7)]), np.bincount(labels)
    )
    with pytest.raises(NaloraError, match="class 'd'"):
        draw_shots(labels, (*names, "d"), 2, 7)


def test_batches_are_pure_and_every_epoch_holds_every_image(picture_folder) -> None:
    folder = picture_folder(cat=4, dog=4)
    stream = data(folder)
    seen = [stream.batch_at(row) for row in (0, 4, 8)]
    for row, batch in zip((0, 4, 8), seen, strict=True):
        again = data(folder).batch_at(row)
        assert batch["pixels"].shape == (1, 4, 12, 12, 3)
        for name in ("pixels", "labels"):
            np.testing.assert_array_equal(batch[name], again[name])
    first = np.concatenate([batch["labels"][0] for batch in seen[:2]])
    np.testing.assert_array_equal(np.bincount(first), [4, 4])
    positions = {data(folder, **change).fingerprint for change in ({}, {"seed": 2}, {"augment": "flip"})}
    assert len(positions) == 3
    # The same image in another epoch is changed in another way.
    still = data(folder, augment="none")
    assert not np.array_equal(
        np.sort(seen[0]["pixels"].ravel()), np.sort(still.batch_at(0)["pixels"].ravel())
    )


def test_augmentation_keeps_what_it_promises() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    crop, flip, none = (VisionConfig(augment=a, crop_area=0.4) for a in ("crop", "flip", "none"))
    assert augmented(image, none, generator(0)) is image
    flipped = {np.asarray(augmented(image, flip, generator(0, i))).tobytes() for i in range(20)}
    assert flipped == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}
    np.testing.assert_array_equal(
        augmented(image, crop, generator(3)), augmented(image, crop, generator(3))
    )
    shares = []
    for i in range(300):
        left, top, right, bottom = crop_box(60, 40, 0.4, generator(9, i))
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        shares.append((right - left) * (bottom - top) / 2400)
    assert min(shares) > 0.35
    assert np.std(shares) > 0.1
