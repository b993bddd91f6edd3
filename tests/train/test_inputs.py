"""Inputs are judged by what is quickly read: the data, and the model's description without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.inputs import open_records
from nalora_jax.weights.hub import ResolvedSource
from tests import tiny


@pytest.fixture
def described(tmp_path: Path) -> ResolvedSource:
    """A model of which there is nothing but the description."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.HF))
    return ResolvedSource("hf", tmp_path, "org/name")


def test_rules_are_judged_without_weights(described: ResolvedSource) -> None:
    base = ModelConfig.from_hf(json.loads((described.path / "config.json").read_text()))
    spec = adapter_spec(RunConfig(lora=LoRAConfig(rules=(LoRARule("ffn/gate_proj", 4),))), base)
    assert [path for path, _ in spec.targets] == ["layers/ffn/gate_proj"]
    with pytest.raises(NaloraError, match="which matches nothing"):
        adapter_spec(RunConfig(lora=LoRAConfig(rules=(LoRARule("mlp/"),))), base)
    with pytest.raises(NaloraError, match="rank"):
        adapter_spec(RunConfig(lora=LoRAConfig(rules=(LoRARule("ffn/gate_proj", 17),))), base)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(20)))
    return path


def test_data_and_splits_are_opened(data: Path, tmp_path: Path) -> None:
    config = DataConfig(dataset=str(data), train_split="train[:10]", eval_split="train[10:]")
    train, held_out = open_records(config)
    assert (len(train), len(held_out)) == (10, 10)
    (tmp_path / "broken.jsonl").write_text("no JSON\n")
    for changed, said in [
        ({"dataset": str(tmp_path / "none.jsonl")}, "none.jsonl: expected a readable file"),
        ({"eval_split": "train[5:]"}, "--data.eval-split: expected records that .* does not train on"),
        ({"eval_split": "valid"}, r"data.jsonl\[valid\]"),
        ({"eval_split": str(tmp_path / "broken.jsonl")}, "broken.jsonl:1: expected a JSON object"),
        ({"dataset": "socialqia"}, "--data.dataset: .*did you mean socialiqa"),
    ]:
        with pytest.raises(NaloraError, match=said):
            open_records(DataConfig(**(vars(config) | changed)))


def test_evaluation_on_what_is_trained_on_is_warned_of(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    copy.write_text(data.read_text())
    other.write_text(data.read_text().replace('"x"', '"y"'))
    for eval_split, warned in (("train", True), (str(copy), True), (str(other), False), ("auto", False)):
        caplog.clear()
        open_records(DataConfig(dataset=str(data), train_split="train", eval_split=eval_split))
        assert ("holds the records that are trained on" in caplog.text) == warned
