"""A disk that is really full, under all that is written: one error that names the file, nothing half-written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule
from nalora_jax.data.pipeline import train_data
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.report.html import write_report
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.log import MetricsLog
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.peft import export_adapter
from nalora_jax.weights.tokenizer_files import copy_tokenizer
from tests import tiny
from tests.param_trees import init_params

FULL = r"No space left on device|File too large"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# A model of some 300 kB.
WIDE = tiny.HF | {"hidden_size": 64, "intermediate_size": 256}


def wide() -> ModelConfig:
    return ModelConfig.from_hf(WIDE)


def save_and_wait(checkpoints: Checkpointer, state: dict[str, Any]) -> None:
    checkpoints.save(2, state, {})
    checkpoints.wait()


def test_checkpoint(small_disk: Path) -> None:
    small, large = ({"x": jax.random.normal(jax.random.key(0), (size, 100))} for size in (50, 700))
    with Checkpointer(small_disk / "c", fingerprint="f", config={}) as checkpoints:
        checkpoints.save(1, small, {})
        checkpoints.wait()
        with pytest.raises(
            NaloraError, match=rf"checkpoint in {small_disk}/c: .*({FULL}); steps \[1\] are intact"
        ):
            save_and_wait(checkpoints, large)
        assert [path.name for path in (small_disk / "c").iterdir()] == ["1"]
        np.testing.assert_array_equal(checkpoints.restore("latest", small)[0]["x"], small["x"])


def test_adapter(small_disk: Path) -> None:
    config = wide()
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn", 48),)), projection_shapes(config), config.n_layers)
    lora = init_lora(config, spec, jax.random.key(0), None)
    with pytest.raises(NaloraError, match=rf"{small_disk}/adapter: .*({FULL})"):
        export_adapter(lora, spec, config, small_disk / "adapter", base_model_name="b")
    assert list(small_disk.iterdir()) == []


def test_merged_model(small_disk: Path, tmp_path: Path) -> None:
    config = wide()
    params = init_params(config, jax.random.key(0))
    folder = tiny.make_model(tmp_path / "model")
    options: dict[str, Any] = {"hf_config": WIDE, "tokenizer": partial(copy_tokenizer, folder)}
    with pytest.raises(NaloraError, match=rf"{small_disk}/merged: .*({FULL})"):
        write_merged(small_disk / "merged", config, params, None, AdapterSpec(), **options)
    assert list(small_disk.iterdir()) == []


def test_token_cache(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(tiny.make_model(tmp_path / "model"))
    questions = tiny.make_questions(tmp_path / "questions.jsonl", 20_000)
    monkeypatch.setenv("NALORA_CACHE", str(small_disk / "cache"))
    with pytest.raises(
        NaloraError, match=rf"{small_disk}/cache/tokens/\w+: .*({FULL}); free space, or set NALORA_CACHE"
    ):
        train_data(DataConfig(dataset=str(questions)), tokenizer, batch_size=8)
    assert files(small_disk) == []


def write_many(metrics: MetricsLog, line: dict[str, Any]) -> None:
    for step in range(1, 1000):
        metrics.write(line | {"step": step, "layers": {"importance": jnp.ones((30, 4))}})


def test_log_and_report(small_disk: Path) -> None:
    line = {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 9.0,
        "seconds": 1.0,
    }
    with MetricsLog(small_disk) as metrics:
        metrics.start({"steps": 1}, versions={}, device="cpu")
        with pytest.raises(NaloraError, match=rf"{small_disk}/metrics.jsonl: .*({FULL}).*--resume"):
            write_many(metrics, line)
        with pytest.raises(NaloraError, match=rf"{small_disk}/report.html: .*({FULL}); make room"):
            write_report(small_disk)
    assert files(small_disk) == ["metrics.jsonl"]
