"""Mixtures by weight, what is held out where nobody says so, and records that a program hands in."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.config import DataConfig, RunConfig, check
from nalora_jax.data.given import NAME, FormattedSource, given_sources
from nalora_jax.data.source import RecordsSource, components
from nalora_jax.data.sources import MOST, open_pair, open_source, split_to_measure
from nalora_jax.errors import NaloraError


def records(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}", "completion": f" {i}"} for i in range(count)]


def texts(source: Any) -> list[str]:
    return [record["prompt"] for record in source.read(range(len(source)))]


def test_weights_say_how_often_a_record_is_seen(write_jsonl: Callable[..., str]) -> None:
    a, b = write_jsonl(*records("a", 10), name="a.jsonl"), write_jsonl(*records("b", 8), name="b.jsonl")
    held = write_jsonl(*records("c", 3), name="c.jsonl")
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


def test_names_of_a_mixture_and_names_with_commas_and_stars(tmp_path: Path) -> None:
    names = [f"part_{number:03}.jsonl" for number in range(40)]  # longer than a file's name may be
    assert components(",".join(names)) == [(name, 1.0) for name in names]
    check(RunConfig(data=DataConfig(",".join(names))))
    odd = tmp_path / "a,b*2"
    odd.write_text("{}")
    assert components(str(odd)) == [(str(odd), 1.0)]
    assert components("data/train-*.parquet*3,x") == [("data/train-*.parquet", 3.0), ("x", 1.0)]


@pytest.mark.parametrize(("size", "count"), [(4, 2), (400, 20), (1_000, 50), (12_000, MOST)])
def test_one_in_twenty_is_held_out_where_nothing_is_but_20_of_few(size: int, count: int) -> None:
    source = {"train": RecordsSource("mine", records("x", size))}
    train, held = open_pair(DataConfig(), source=source)
    assert (len(train), len(held)) == (size - count, count)
    assert sorted(texts(train) + texts(held)) == sorted(record["prompt"] for record in records("x", size))
    assert texts(open_pair(DataConfig(), source=source)[1]) == texts(held)
    assert train.fingerprint != held.fingerprint
    message = "mine: expected at least 4 records, of which two are held out, found 3"
    with pytest.raises(NaloraError, match=message):
        open_pair(DataConfig(), source={"train": RecordsSource("mine", records("x", 3))})


def test_a_split_of_its_own_is_taken(tmp_path: Path) -> None:
    for name, count in (("train", 9), ("validation", 5)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(one) for one in records(name, count)))
    config = DataConfig(dataset=f"{tmp_path}/")
    train, held = open_pair(config)
    assert (len(train), len(held)) == (9, 5)
    assert split_to_measure(config) == "validation"
    assert split_to_measure(DataConfig(dataset=str(tmp_path / "train.jsonl"))) == "train"


def test_records_of_a_program() -> None:
    config, source = given_sources(DataConfig(), data=iter(records("x", 40)), format=None)
    assert config.dataset == NAME
    assert [len(one) for one in open_pair(config, source=source)] == [32, 8]
    splits = {"train": records("x", 9), "validation": records("y", 5)}
    _, source = given_sources(DataConfig(), data=splits, format=None)
    assert [len(one) for one in open_pair(DataConfig(), source=source)] == [9, 5]
    with pytest.raises(NaloraError, match=r"data\['train'\], record 1: expected a dict, found a str"):
        given_sources(DataConfig(), data=[{}, "x"], format=None)  # type: ignore[list-item]
    with pytest.raises(NaloraError, match="run: expected data or source, found both"):
        given_sources(DataConfig(), data=[{}], source={}, format=None)


def test_a_function_makes_examples(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(*[{"q": f"q{i}", "a": i} for i in range(40)])

    def example(record: dict[str, Any]) -> dict[str, Any] | None:
        return None if record["a"] == 3 else {"prompt": record["q"], "completion": f" {record['a']}"}

    config, source = given_sources(DataConfig(dataset=path), format=example)
    assert config.dataset == path
    train, held = open_pair(config, source=source)
    assert sorted(texts(train) + texts(held)) == sorted(f"q{i}" for i in range(40) if i != 3)
    whole = source["train"]
    assert whole.where(3) == f"{path}:5"  # the line after the one that was left out
    source = open_source(config, "train")
    assert FormattedSource(source, lambda record: {"prompt": "x"}).fingerprint != whole.fingerprint
    message = rf"format, {path}:1: expected an example, found KeyError: 'question'"
    with pytest.raises(NaloraError, match=message):
        FormattedSource(source, lambda record: record["question"])
    with pytest.raises(NaloraError, match=rf"format, {path}:1: expected a dict, or None, found str"):
        FormattedSource(source, lambda record: "text")  # type: ignore[arg-type,return-value]


class _Dataset:
    """As much of datasets.Dataset as is read."""

    _fingerprint = "abc"

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._rows = rows
        split = types.SimpleNamespace(num_examples=40)
        self.info = types.SimpleNamespace(splits={"train": split, "test": split})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: list[int]) -> dict[str, list[str]]:
        return {name: [self._rows[i][name] for i in indices] for name in self._rows[0]}


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str) -> _Dataset:
        if name != "org/data":
            raise FileNotFoundError(f"Couldn't find {name}\non the hub")
        assert config == "small"
        return _Dataset(records(split, 40 if split == "train" else 20))

    names = lambda name, config: ["train", "test"]  # noqa: E731
    fake = types.SimpleNamespace(get_dataset_split_names=names, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    config = DataConfig(dataset="hf:org/data:small")
    train, held = open_pair(config)
    assert (len(train), len(held)) == (32, 8)
    part = open_source(config, "train[50%:]")
    assert part.spans == [("train", 20, 40)]
    assert part.read([1])[0]["completion"] == " 1"
    message = r"hf:org/none\[train\]: expected a data set that can be loaded from the hub, found"
    with pytest.raises(NaloraError, match=message):
        open_source(DataConfig(dataset="hf:org/none"), "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = "hf:org/data: expected the library datasets, found none; pip install"
    with pytest.raises(NaloraError, match=message):
        open_source(DataConfig(dataset="hf:org/data"), "train")
