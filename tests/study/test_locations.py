"""Paths of a protocol, from another folder than the study's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.study.locations import located
from nalora_jax.study.plan import pending
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.resources import Resources


def test_a_study_is_found_from_any_folder(
    study: Path, base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved / "base")
    (moved / "data").mkdir()
    for name in ("z.jsonl", "again.jsonl"):
        shutil.copy(questions, moved / "data" / name)
    text = (study / "protocol.toml").read_text().replace(str(base), "base")
    text = text.replace(str(questions), "data/z.jsonl", 1).replace(str(questions), "data/again.jsonl")
    (moved / "protocol.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    protocol = read_protocol("moved")
    run = pending(protocol, {})[0]
    assert (run.config.model, run.config.data.dataset) == ("moved/base", "moved/data/z.jsonl")
    assert run.cell.model == "base"
    assert list(Resources(protocol).probe_items(run)) == ["z_again"]
    monkeypatch.chdir(moved)
    assert pending(read_protocol("."), {})[0].id == run.id


def test_names_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "study"
    for name in ("socialiqa", "train", "photos", "org/model"):
        (folder / name).mkdir(parents=True)
    (folder / "b.csv").write_text("x")
    monkeypatch.chdir(tmp_path)

    def paths(**data: str) -> list[str]:
        config = located(RunConfig(model="org/model", data=DataConfig(**data)), Path("study"))
        return [config.model, config.data.dataset, config.data.train_split, config.data.eval_split]

    named = paths(dataset="socialiqa", train_split="train[:5]", eval_split="train")
    assert named == ["study/org/model", "socialiqa", "train[:5]", "train"]
    assert paths(dataset="hf:a/b", eval_split="b.csv")[1::2] == ["hf:a/b", "study/b.csv"]
    mixed = paths(dataset="missing.jsonl*3,gs://x/y.jsonl,./photos,/abs/z.jsonl")
    assert mixed[1] == "study/missing.jsonl*3,gs://x/y.jsonl*1,study/photos*1,/abs/z.jsonl*1"
    (tmp_path / "here.jsonl").write_text("{}")
    with pytest.raises(
        NaloraError, match="study: here.jsonl: expected a path relative to the study's folder"
    ):
        paths(dataset="here.jsonl")
