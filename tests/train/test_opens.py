"""A run opens each of its files once, and hands them on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nalora_jax import run
from nalora_jax.data import store
from nalora_jax.data.sources import FileSource
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.models.config import ModelConfig
from nalora_jax.train import inputs, optimizers
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


def _counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counting(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return counting


def test_a_run_opens_sources_tokenizer_and_model_config_once(tmp_path, monkeypatch) -> None:
    """With an automatic row length and learning rate, and steps of epochs, which all need the data first."""
    config = tiny.make_config(tmp_path, output=str(tmp_path / "run"), epochs=1.0)
    counts: Counter[str] = Counter()
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path / "cache"))
    from_folder = _counted(counts, "tokenizer", Tokenizer.from_folder)
    monkeypatch.setattr(Tokenizer, "from_folder", staticmethod(from_folder))
    from_hf = _counted(counts, "config", ModelConfig.from_hf)
    monkeypatch.setattr(ModelConfig, "from_hf", staticmethod(from_hf))
    monkeypatch.setattr(FileSource, "__init__", _counted(counts, "source", FileSource.__init__))
    monkeypatch.setattr(store, "render_record", _counted(counts, "rendered", store.render_record))
    resolve = _counted(counts, "rate", optimizers.with_learning_rate)
    monkeypatch.setattr(inputs, "with_learning_rate", resolve)
    automatic = {"optimizer": replace(config.optimizer, learning_rate=0.0)}
    run(replace(config, data=replace(config.data, max_length=0), **automatic))
    trained = 48  # 80% of 60 records; sources are those of two splits
    assert counts == {"tokenizer": 1, "config": 1, "source": 2, "rendered": trained, "rate": 1}
