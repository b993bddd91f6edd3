"""A disk that is really full, under all that is written: one error that names the file, nothing
half-written."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule
from nalora_jax.data.pipeline import train_data
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.report.html import write_report
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.log import MetricsLog
from nalora_jax.weights.peft_export import export_adapter
from tests import tiny

FULL = r"No space left on device|File too large"
WIDE = tiny.HF | {"hidden_size": 64, "intermediate_size": 256}  # a model of some 300 kB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in which 192 kB fit: a file system of that size; without the right to mount one,
    files of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (192_000, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_checkpoint(small_disk: Path) -> None:
    small, large = ({"x": jax.random.normal(jax.random.key(0), (size, 100))} for size in (50, 700))
    with Checkpointer(small_disk / "c", fingerprint="f", config={}) as checkpoints:
        checkpoints.save(1, small, {})
        checkpoints.wait()
        wanted = rf"checkpoint in {small_disk}/c: .*({FULL}); steps \[1\] are intact"
        with pytest.raises(NaloraError, match=wanted):  # noqa: PT012
            checkpoints.save(2, large, {})
            checkpoints.wait()
        assert [path.name for path in (small_disk / "c").iterdir()] == ["1"]
        np.testing.assert_array_equal(checkpoints.restore("latest", small)[0]["x"], small["x"])


def test_merged_model_and_adapter(small_disk: Path) -> None:
    with pytest.raises(NaloraError, match=rf"{small_disk}/merged: .*({FULL})"):
        tiny.make_model(small_disk / "merged", WIDE)
    config = ModelConfig.from_hf(WIDE)
    spec = resolve(LoRAConfig((LoRARule("ffn", 48),)), projection_shapes(config), config.n_layers)
    lora = init_lora(config, spec, jax.random.key(0), None)
    with pytest.raises(NaloraError, match=rf"{small_disk}/adapter: .*({FULL})"):
        export_adapter(lora, spec, config, small_disk / "adapter", base_model_name="b")
    assert list(small_disk.iterdir()) == []


def test_token_cache(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tiny.make_questions(tmp_path / "questions.jsonl", 20_000)
    monkeypatch.setenv("NALORA_CACHE", str(small_disk / "cache"))
    wanted = rf"{small_disk}/cache/tokens/\w+: .*({FULL}); free space, or set NALORA_CACHE"
    with pytest.raises(NaloraError, match=wanted):
        train_data(DataConfig(dataset=str(questions)), tiny.word_tokenizer(), batch_size=8)
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_log_and_report(small_disk: Path) -> None:
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")
    line = dict.fromkeys(names, 1.0) | {"layers": {"importance": jnp.ones((30, 4))}}
    with MetricsLog(small_disk) as metrics:
        metrics.start({"steps": 1}, versions={}, device="cpu")
        with pytest.raises(NaloraError, match=rf"{small_disk}/metrics.jsonl: .*({FULL}).*--resume"):  # noqa: PT012
            for step in range(1, 1000):
                metrics.write(line | {"step": step})
        with pytest.raises(NaloraError, match=rf"{small_disk}/report.html: .*({FULL}); make room"):
            write_report(small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["metrics.jsonl"]
