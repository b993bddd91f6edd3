from __future__ import annotations

import importlib
import sys

import pytest
from tensorflow_datasets.core import registered

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.chat import messages_of
from nalora_jax.data.files import open_rows
from nalora_jax.data.images.files import open_image
from nalora_jax.data.images.opened import open_images
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.sources import check_disjoint, open_pair, open_source
from nalora_jax.errors import NaloraError

RECORDS = [{"prompt": f"p{index}", "completion": f"ü{index}"} for index in range(20)]


def test_lines_by_index_past_blank_ones(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": "\xc3\xbc"}\n   \r\n{"a": 2}\r\n\n{"a": 3}')
    lines = open_rows(path)
    assert lines.read([2, 0, 1]) == [{"a": 3}, {"a": "ü"}, {"a": 2}]
    assert [lines.where(index) for index in range(3)] == [f"{path}:2", f"{path}:4", f"{path}:6"]


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("socialqa", "train", r"--data.dataset: expected a task.*found 'socialqa'; .*socialiqa_mc"),
        ("socialiqa", "test", r"socialiqa, split: expected one of train, validation, .*found 'test'"),
        ("data.jsonl", "validation", r"data.jsonl\[validation\]: expected one split, \"train\""),
        ("data.jsonl", "train[:0]", "data.jsonl.*: expected at least one record"),
        ("data.jsonl*0,data.jsonl", "train", r"expected data sets with weights in \(0, 1000\]"),
        ("data.jsonl,,data.jsonl", "train", r"expected data sets with weights in \(0, 1000\]"),
        ("needle:300", "train", "needle:WORDS, with WORDS one of 250, 500, .* 256000, found 'needle:300"),
    ],
)
def test_unknown_data_and_splits_are_refused(write_jsonl, monkeypatch, tmp_path, dataset, split, message):
    write_jsonl(*RECORDS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NaloraError, match=message):
        open_source(DataConfig(dataset=dataset), split)


def test_fingerprint_follows_content_and_split(write_jsonl):
    def fingerprint(name, split="train"):
        return open_source(DataConfig(dataset=name), split).fingerprint

    one = fingerprint(write_jsonl(*RECORDS))
    assert one == fingerprint(write_jsonl(*RECORDS, name="same.jsonl"))
    assert one != fingerprint(write_jsonl(*RECORDS[1:], RECORDS[0], name="other.jsonl"))
    assert one != fingerprint(write_jsonl(*RECORDS), "train[1:]")


def test_overlap_of_training_and_evaluation(write_jsonl):
    config = DataConfig(dataset=write_jsonl(*RECORDS))
    train, tail = open_source(config, "train"), open_source(config, "train[-5%:]")
    with pytest.raises(NaloraError, match=r"--data.eval-split: .*shares 1 with it; hold some out"):
        check_disjoint(train, tail)
    check_disjoint(open_source(config, "train[:-5%]"), tail)
    # Another file is a split, too.
    other = open_source(config, write_jsonl(*RECORDS[:3], name="eval.jsonl"))
    assert other.read(range(3)) == RECORDS[:3]
    check_disjoint(train, other)


BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class PondTalk(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "reply": text, "score": tfds.features.Scalar(np.float32),
                    "turns": tfds.features.Sequence({"role": text, "content": text}),
                    "image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["newt", "toad"])}
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True,
                                     features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(np.full((9, 8 + i, 3), i, np.uint8)).save(buffer, "PNG")
            turns = [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]
            yield i, {"question": f"Qü{i}", "reply": f" A{i}", "turns": turns, "score": i / 2,
                      "image": buffer.getvalue(), "label": i % 2}
"""


def test_users_own_tfds_data_set(tmp_path, monkeypatch):
    """Texts and images; the builder is needed to prepare the files, not to read them."""
    (tmp_path / "pond_talk.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    with registered.skip_registration():
        module = importlib.import_module("pond_talk")
    module.PondTalk(data_dir=tmp_path / "data", file_format="array_record").download_and_prepare()
    config = DataConfig("tfds:pond_talk", data_dir=str(tmp_path / "data"), messages_field="turns")
    source = open_source(config, "train[50%:]")
    record, size = source[1], len(source)
    assert (size, record["question"], record["reply"], record["score"]) == (20, "Qü21", " A21", 10.5)
    assert type(record["score"]) is float
    assert messages_of(record, config, "")[1] == {"role": "assistant", "content": "A21"}
    assert "pond_talk/1.2.0" in source.fingerprint
    images = open_images(config, VisionConfig(), "train[50%:]")
    assert images.classes() == ("newt", "toad")
    assert images.labels(images.classes())[:3].tolist() == [0, 1, 0]
    image = open_image(images.image(images[1], ""))
    assert (image.size, image.getpixel((0, 0))) == ((29, 9), (21, 21, 21))
    assert source.spans == images.spans == [("train", 20, 40)]
    assert open_images(config, VisionConfig(classes=("a", "b")), "test").classes() == ("a", "b")
    assert "tensorflow" not in sys.modules
    unreadable = r"tfds:pond_talk\[valid\]: expected a readable TFDS data set"
    photo, one = VisionConfig(image_field="photo"), VisionConfig(classes=("a",))
    for function, arguments, message in (
        (open_source, (config, "valid"), unreadable),
        (open_images, (config, VisionConfig(), "valid"), unreadable),
        (open_source, (config, "train[oops"), r"tfds:pond_talk\[train\[oops"),
        (
            open_images,
            (config, photo, "train"),
            "pond_talk: photo: expected an image, found only the fields",
        ),
        (open_images(config, one, "test").classes, (), "--vision.classes: expected 2 names, found 1"),
    ):
        with pytest.raises(NaloraError, match=message):
            function(*arguments)


def test_sources_by_split_take_the_place_of_a_data_set():
    given = {"mine": RecordsSource("mine", RECORDS[:12]), "other": RecordsSource("other", RECORDS[12:])}
    config = DataConfig(dataset="nowhere", train_split="mine", eval_split="other")
    assert [len(source) for source in open_pair(config, source=given)] == [12, 8]
    with pytest.raises(NaloraError, match="source: expected a split 'third', found mine, other"):
        open_source(config, "third", source=given)
    with pytest.raises(NaloraError, match="same: expected at least one record"):
        RecordsSource("same", [])
    with pytest.raises(NaloraError, match="shares 12"):
        open_pair(config, source={"mine": given["mine"], "other": given["mine"]})
