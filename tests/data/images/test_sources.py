"""Images by folder and by list: labels, captions, splits, and what is broken, by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.files import open_image
from nalora_jax.data.images.opened import open_images
from nalora_jax.errors import NaloraError

PLAIN = VisionConfig()


def test_a_folder_per_class(picture_folder) -> None:
    folder = picture_folder(cat=3, dog=2)
    source = open_images(DataConfig(dataset=str(folder)), PLAIN, "train")
    assert source.classes() == ("cat", "dog")
    np.testing.assert_array_equal(source.labels(source.classes()), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(source.labels(("dog", "cat")), [1, 1, 1, 0, 0])
    assert source.where(4) == "dog/1.png"
    tail = open_images(DataConfig(dataset=str(folder)), PLAIN, "train[60%:]")
    assert [tail.where(i) for i in range(len(tail))] == ["dog/0.png", "dog/1.png"]
    assert source.fingerprint != tail.fingerprint
    assert tail.spans == [("train", 3, 5)]
    assert open_image(source.image(*source.read([4]), "")).size == (14, 11)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_of_captions(picture_folder, form) -> None:
    folder = picture_folder(cat=2)
    rows = [{"file_name": "cat/0.png", "caption": "a cat, asleep", "label": "cat"}]
    rows.append({"file_name": "cat/1.png", "caption": 'the "other" cät', "label": "cat"})
    if form == "csv":
        text = (
            "file_name,caption,label\n"
            + 'cat/0.png,"a cat, asleep",cat\ncat/1.png,"the ""other"" cät",cat\n'
        )
        (folder / "captions.csv").write_text(text, encoding="utf-8")
    else:
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for dataset in (folder, folder / f"captions.{form}"):
        source = open_images(DataConfig(dataset=str(dataset)), PLAIN, "train")
        assert source.captions([1, 0]) == [rows[1]["caption"], rows[0]["caption"]]
        assert open_image(source.image(*source.read([0]), "")).size == (14, 10)


def test_a_list_cannot_reach_other_files(picture_folder) -> None:
    folder = picture_folder(cat=1)
    (folder.parent / "secret.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    (folder / "captions.csv").write_text("file_name,caption\n../secret.png,oh\n")
    source = open_images(DataConfig(dataset=str(folder)), PLAIN, "train")
    with pytest.raises(NaloraError, match="a file in the list's folder"):
        source.read([0])


def test_broken_images_are_named_and_left_out_or_refused(picture_folder, caplog) -> None:
    folder = picture_folder(cat=4)
    (folder / "cat" / "1.png").write_bytes(b"nothing of the kind")
    whole = (folder / "cat" / "2.png").read_bytes()
    (folder / "cat" / "2.png").write_bytes(whole[:60])
    data, indices = DataConfig(dataset=str(folder)), np.arange(4)
    np.testing.assert_array_equal(open_images(data, PLAIN, "train").readable(indices), [0, 3])
    assert [text.split(":")[1] for text in caplog.messages] == [" cat/1.png", " cat/2.png"]
    with pytest.raises(NaloraError, match=r"cat/[12]\.png"):
        open_images(data, VisionConfig(broken="error"), "train").readable(indices)
    with pytest.raises(NaloraError, match="at least one record with readable images"):
        open_images(data, VisionConfig(max_pixels=10), "train").readable(indices)


def test_what_is_missing_is_named(picture_folder, tmp_path) -> None:
    folder = picture_folder(cat=1)
    for dataset, fields, message in (
        ("nowhere", PLAIN, "expected a registered data set"),
        (str(tmp_path / "pictures" / "cat"), PLAIN, "at least one image"),
    ):
        with pytest.raises(NaloraError, match=message):
            open_images(DataConfig(dataset=dataset), fields, "train")
    source = open_images(DataConfig(dataset=str(folder)), PLAIN, "train")
    with pytest.raises(NaloraError, match="--vision.caption-field"):
        source.captions([0])
    with pytest.raises(NaloraError, match="one of 1 classes"):
        source.labels(("bird",))
    with pytest.raises(NaloraError, match="train"):
        open_images(DataConfig(dataset=str(folder)), PLAIN, "validation")
    (folder / "captions.csv").write_text("file_name,caption\ncat/0.png\n")
    with pytest.raises(NaloraError, match="captions.csv:2"):
        open_images(DataConfig(dataset=str(folder)), PLAIN, "train")
