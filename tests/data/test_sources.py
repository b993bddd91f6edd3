from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.files import JsonLines
from nalora_jax.data.pipeline import train_data
from nalora_jax.data.questions import held_out
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.sources import check_disjoint, open_pair, open_source
from nalora_jax.errors import NaloraError

RECORDS = [{"prompt": f"p{index}", "completion": f"ü{index}"} for index in range(20)]


def test_lines_by_index_past_blank_ones(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": "\xc3\xbc"}\n   \r\n{"a": 2}\r\n\n{"a": 3}')
    lines = JsonLines(path)
    assert lines.read([2, 0, 1, -1]) == [{"a": 3}, {"a": "ü"}, {"a": 2}, {"a": 3}]
    assert [lines.where(index) for index in range(3)] == [f"{path}:2", f"{path}:4", f"{path}:6"]
    assert lines.where(-1) == f"{path}:6"


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("socialqa", "train", r"--data.dataset: expected a task.*found 'socialqa'; .*socialiqa_mc"),
        ("socialiqa", "test", r"socialiqa, split: expected one of train, validation, .*found 'test'"),
        ("data.jsonl", "validation", r"data.jsonl\[validation\]: expected one split, \"train\""),
        ("data.jsonl", "train[:0]", "data.jsonl.*: expected at least one record"),
        (
            "data.jsonl*0,data.jsonl",
            "train",
            r"--data.dataset: expected data sets with weights in \(0, 1000\]",
        ),
        (
            "data.jsonl,,data.jsonl",
            "train",
            r"--data.dataset: expected data sets with weights in \(0, 1000\]",
        ),
        ("needle:300", "train", "needle:WORDS, with WORDS one of 250, 500, .* 256000, found 'needle:300"),
    ],
)
def test_unknown_data_and_splits_are_refused(write_jsonl, monkeypatch, tmp_path, dataset, split, message):
    write_jsonl(*RECORDS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NaloraError, match=message):
        open_source(DataConfig(dataset=dataset), split)


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", range(20)), ("train[-25%:]", range(15, 20)), ("train[3:5]+train[18:]", [3, 4, 18, 19])],
)
def test_splits_of_a_file(write_jsonl, split, expected):
    path = write_jsonl(*RECORDS)
    source = open_source(DataConfig(dataset=path), split)
    assert source.read(range(len(source))) == [RECORDS[index] for index in expected]
    assert source.where(0) == f"{path}:{expected[0] + 1}"


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
    other = open_source(
        config, write_jsonl(*RECORDS[:3], name="eval.jsonl")
    )  # another file is a split, too
    assert other.read(range(3)) == RECORDS[:3]
    check_disjoint(train, other)


BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Builder(tfds.core.GeneratorBasedBuilder):
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
READ = """
import sys
from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.chat import messages_of
from nalora_jax.data.images.files import open_image
from nalora_jax.data.images.opened import open_images
from nalora_jax.data.sources import open_source

config = DataConfig(dataset="tfds:pond_talk", data_dir=sys.argv[1], messages_field="turns")
source = open_source(config, "train[50%:]")
record = source[1]
assert len(source) == 20 and record["question"] == "Qü21" and record["reply"] == " A21", record
assert record["score"] == 10.5 and type(record["score"]) is float, record
assert messages_of(record, config, "")[1] == {"role": "assistant", "content": "A21"}, record
assert "pond_talk/1.2.0" in source.fingerprint
images = open_images(config, VisionConfig(), "train[50%:]")
assert images.classes() == ("newt", "toad") and images.labels(images.classes())[:3].tolist() == [0, 1, 0]
image = open_image(images.image(images[1], ""))
assert image.size == (29, 9) and image.getpixel((0, 0)) == (21, 21, 21), image
assert source.spans == images.spans == [("train", 20, 40)]
assert open_images(config, VisionConfig(classes=("a", "b")), "test").classes() == ("a", "b")


def refused(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        print(error)


for opener in (lambda split: open_source(config, split), lambda split: open_images(config, VisionConfig(), split)):
    refused(opener, "valid")
refused(open_source, config, "train[oops")
refused(open_images, config, VisionConfig(image_field="photo"), "train")
refused(open_images(config, VisionConfig(classes=("a",)), "test").classes)
assert "tensorflow" not in sys.modules
"""


def test_users_own_tfds_data_set(tmp_path):
    """Texts and images, prepared with the builder, then read in a process that has only the files."""
    package = tmp_path / "code" / "pond_talk"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pond_talk_dataset_builder.py").write_text(BUILDER)
    prepare = (
        "from pond_talk.pond_talk_dataset_builder import Builder; import sys;"
        "Builder(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()"
    )
    root = str(Path(__file__).parents[2])
    for code, path in ((prepare, str(package.parent)), (READ, root)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "data")],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    unknown, no_images, malformed, photo, names = done.stdout.strip().splitlines()
    assert "tfds:pond_talk[valid]: expected a readable TFDS data set" in unknown
    assert "tfds:pond_talk[valid]: expected a readable TFDS data set" in no_images
    assert "tfds:pond_talk[train[oops]" in malformed
    assert "tfds:pond_talk: photo: expected an image, found only the fields" in photo
    assert "--vision.classes: expected 2 names, found 1" in names


def test_sources_by_split_take_the_place_of_a_data_set(tokenizer, cache):
    given = {"mine": RecordsSource("mine", RECORDS[:12]), "other": RecordsSource("other", RECORDS[12:])}
    config = DataConfig(dataset="nowhere", train_split="mine", eval_split="other", max_length=64)
    data = train_data(config, tokenizer, batch_size=4, source=given)
    assert data.store.counts.examples == 12
    reported, selecting = held_out(open_pair(config, source=given)[1], config, tokenizer)
    assert len(reported) + len(selecting) == 8
    with pytest.raises(NaloraError, match="source: expected a split 'third', found mine, other"):
        open_source(config, "third", source=given)
    with pytest.raises(NaloraError, match="same: expected at least one record"):
        RecordsSource("same", [])
    same = {"mine": given["mine"], "other": given["mine"]}
    with pytest.raises(NaloraError, match="shares 12"):
        open_pair(config, source=same)
