"""Data sets by name, mixtures by weight, what is held out, and records that a program hands in."""

import importlib
import json
import sys
import types
from collections import Counter

import pytest
from tensorflow_datasets.core import registered

from nalora_jax.config import DataConfig, RunConfig, VisionConfig, check
from nalora_jax.data.chat_text import messages_of
from nalora_jax.data.given import IN_MEMORY, format_source, resolve_sources
from nalora_jax.data.images.image_files import open_image
from nalora_jax.data.images.opened import open_images
from nalora_jax.data.source import RecordsSource, components, share_text
from nalora_jax.data.sources import (
    MOST_HELD_OUT,
    check_disjoint,
    open_pair,
    open_source,
    split_to_measure,
)
from nalora_jax.errors import NaloraError


def records(name, count):
    return [{"prompt": f"{name} {i}", "completion": f" ü{i}"} for i in range(count)]


def texts(source):
    return [record["prompt"] for record in source.read(range(len(source)))]


REFUSED = [
    ("socialqa", "train", r"--data.dataset: expected a task.*found 'socialqa'; .*socialiqa_mc"),
    ("socialiqa", "test", r"socialiqa, split: expected one of train, validation, .*found 'test'"),
    ("data.jsonl", "validation", r"data.jsonl\[validation\]: expected one split, \"train\""),
    ("data.jsonl*0,data.jsonl", "train", r"expected data sets with weights in \(0, 1000\]"),
    (
        "needle:300",
        "train",
        "needle:WORDS, with WORDS one of 250, 500, .* 256000, found 'needle:300",
    ),
]


@pytest.mark.parametrize(("dataset", "split", "message"), REFUSED)
def test_unknown_data_and_splits_are_refused(
    write_jsonl, monkeypatch, tmp_path, dataset, split, message
):
    write_jsonl(*records("p", 20))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NaloraError, match=message):
        open_source(DataConfig(dataset=dataset), split)


def test_fingerprint_follows_the_content(write_jsonl):
    rows = records("p", 20)
    contents = {"one": rows, "same": rows, "other": [*rows[1:], rows[0]]}
    paths = [write_jsonl(*lines, name=f"{name}.jsonl") for name, lines in contents.items()]
    one, same, other = (
        open_source(DataConfig(dataset=path), "train").fingerprint for path in paths
    )
    assert one == same != other


def test_overlap_of_training_and_evaluation(write_jsonl):
    config = DataConfig(dataset=write_jsonl(*records("p", 20)))
    train, tail = open_source(config, "train"), open_source(config, "train[-5%:]")
    with pytest.raises(NaloraError, match=r"--data.eval-split: .*shares 1 with it; hold some out"):
        check_disjoint(train, tail)
    check_disjoint(open_source(config, "train[:-5%]"), tail)
    # Another file is a split, too.
    other = open_source(config, write_jsonl(*records("p", 3), name="eval.jsonl"))
    assert other.read(range(3)) == records("p", 3)
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
        features = {"question": text, "score": tfds.features.Scalar(np.float32),
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
            yield i, {"question": f"Qü{i}", "turns": turns, "score": i / 2,
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
    assert (size, record["question"], record["score"]) == (20, "Qü21", 10.5)
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
    for read, message in (
        (lambda: open_source(config, "valid"), unreadable),
        (lambda: open_source(config, "train[oops"), r"tfds:pond_talk\[train\[oops"),
        (
            lambda: open_images(config, photo, "train"),
            "photo: expected an image, found only the fields",
        ),
        (open_images(config, one, "test").classes, "--vision.classes: expected 2 names, found 1"),
    ):
        with pytest.raises(NaloraError, match=message):
            read()


def test_weights_say_how_often_a_record_is_seen(write_jsonl):
    a, b, held = (
        write_jsonl(*records(name, count), name=f"{name}.jsonl")
        for name, count in (("a", 10), ("b", 8), ("c", 3))
    )
    config = DataConfig(dataset=f"{a}*2.5, {b}*.25", eval_split=held)
    train = open_pair(config)[0]
    seen = Counter(texts(train))
    assert sorted(Counter(seen[f"a {i}"] for i in range(10)).items()) == [(2, 5), (3, 5)]
    assert sum(seen[f"b {i}"] for i in range(8)) == 2
    assert train.describe() == f"{a}[train] 25 (93%), {b}[train] 2 (7%)"
    assert train.where(26) in {f"{b}:{i}" for i in range(1, 9)}
    again = open_pair(DataConfig(dataset=f"{a}*2.5,{b}*0.25", eval_split=held))[0]
    assert (again.fingerprint, texts(again)) == (train.fingerprint, texts(train))
    assert len(open_source(config, "train")) == 18  # as data to measure on each counts once


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [(1, 280, "0.4%"), (1, 30_000, "0.003%"), (0, 9, "0%"), (1, 3, "33%"), (9, 9, "100%")],
)
def test_a_small_share_is_not_shown_as_none(count, total, text):
    assert share_text(count, total) == text


def test_names_of_a_mixture_and_names_with_commas_and_stars(tmp_path):
    names = [f"part_{number:03}.jsonl" for number in range(40)]  # longer than a file's name may be
    assert components(",".join(names)) == [(name, 1.0) for name in names]
    check(RunConfig(data=DataConfig(",".join(names))))
    odd = tmp_path / "a,b*2"
    odd.write_text("{}")
    assert components(str(odd)) == [(str(odd), 1.0)]
    assert components("data/train-*.parquet*3,x") == [("data/train-*.parquet", 3.0), ("x", 1.0)]


@pytest.mark.parametrize(
    ("size", "count"), [(4, 2), (400, 20), (1_000, 50), (12_000, MOST_HELD_OUT)]
)
def test_one_in_twenty_is_held_out_where_nothing_is_but_20_of_few(size, count):
    source = {"train": RecordsSource("mine", records("x", size))}
    train, held = open_pair(DataConfig(), source=source)
    assert (len(train), len(held)) == (size - count, count)
    assert sorted(texts(train) + texts(held)) == sorted(
        record["prompt"] for record in records("x", size)
    )
    assert texts(open_pair(DataConfig(), source=source)[1]) == texts(held)
    assert train.fingerprint != held.fingerprint
    message = "mine: expected at least 4 records, of which two are held out, found 3"
    with pytest.raises(NaloraError, match=message):
        open_pair(DataConfig(), source={"train": RecordsSource("mine", records("x", 3))})


def test_a_split_of_its_own_is_taken(tmp_path):
    for name, count in (("train", 9), ("validation", 5)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records(name, count))))
    config = DataConfig(dataset=f"{tmp_path}/")
    assert [len(source) for source in open_pair(config)] == [9, 5]
    assert split_to_measure(config) == "validation"
    assert split_to_measure(DataConfig(dataset=str(tmp_path / "train.jsonl"))) == "train"


def test_records_of_a_program():
    config, source = resolve_sources(DataConfig(), data=iter(records("x", 40)), format=None)
    assert config.dataset == IN_MEMORY
    assert [len(one) for one in open_pair(config, source=source)] == [32, 8]
    splits = {"train": records("x", 9), "validation": records("y", 5)}
    _, source = resolve_sources(DataConfig(), data=splits, format=None)
    assert [len(one) for one in open_pair(DataConfig(), source=source)] == [9, 5]
    with pytest.raises(
        NaloraError, match="source: expected a split 'third', found train, validation"
    ):
        open_source(DataConfig(), "third", source=source)
    with pytest.raises(
        NaloraError, match=r"data\['train'\], record 1: expected a dict, found a str"
    ):
        resolve_sources(DataConfig(), data=[{}, "x"], format=None)
    with pytest.raises(NaloraError, match="run: expected data or source, found both"):
        resolve_sources(DataConfig(), data=[{}], source={}, format=None)


def test_a_function_makes_examples(write_jsonl):
    path = write_jsonl(*[{"q": f"q{i}", "a": i} for i in range(40)])

    def example(record):
        return (
            None if record["a"] == 3 else {"prompt": record["q"], "completion": f" {record['a']}"}
        )

    config, source = resolve_sources(DataConfig(dataset=path), format=example)
    assert config.dataset == path
    train, held = open_pair(config, source=source)
    assert sorted(texts(train) + texts(held)) == sorted(f"q{i}" for i in range(40) if i != 3)
    whole, source = source["train"], open_source(config, "train")
    assert whole.where(3) == f"{path}:5"  # the line after the one that was left out
    assert format_source(source, lambda record: {"prompt": "x"}).fingerprint != whole.fingerprint
    for function, message in (
        (lambda record: record["question"], "an example, found KeyError: 'question'"),
        (lambda record: "text", "a dict, or None, found str"),
    ):
        with pytest.raises(NaloraError, match=rf"format, {path}:1: expected {message}"):
            format_source(source, function)


class Dataset(list):
    """As much of datasets.Dataset as is read: columns by indices, and the sizes of the splits."""

    _fingerprint = "abc"
    info = types.SimpleNamespace(
        splits={name: types.SimpleNamespace(num_examples=40) for name in ("train", "test")}
    )

    def __getitem__(self, indices):
        rows = list(self)
        return {name: [rows[i][name] for i in indices] for name in rows[0]}


def test_data_sets_of_the_hub(monkeypatch):
    def load(name, config, *, split):
        if name != "org/data":
            raise FileNotFoundError(f"Couldn't find {name}\non the hub")
        assert config == "small"
        return Dataset(records(split, 40 if split == "train" else 20))

    names = lambda name, config: ["train", "test"]  # noqa: E731
    fake = types.SimpleNamespace(get_dataset_split_names=names, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    config = DataConfig(dataset="hf:org/data:small")
    assert [len(source) for source in open_pair(config)] == [32, 8]
    part = open_source(config, "train[50%:]")
    assert part.spans == [("train", 20, 40)]
    assert part.read([1])[0]["completion"] == " ü1"
    with pytest.raises(
        NaloraError, match=r"hf:org/none\[train\]: expected a data set that can be loaded"
    ):
        open_source(DataConfig(dataset="hf:org/none"), "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        NaloraError, match="hf:org/data: expected the library datasets, .*; pip install"
    ):
        open_source(DataConfig(dataset="hf:org/data"), "train")
