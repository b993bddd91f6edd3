"""A run of two processes on a tiny model that the launcher starts, and that is preempted and resumed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nalora_jax import run
from nalora_jax.config import MeshConfig, TrainConfig
from tests import tiny
from tests.deploy.test_pod import wait_until


def test_a_run_is_preempted_on_a_slice_and_one_process_completes_it(
    make_cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker receives SIGTERM, as if its machine were reclaimed: both save and exit with status 143."""
    cloud, metrics = make_cloud(), tmp_path / "run/metrics.jsonl"
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=100_000)
    config = tiny.make_config(
        tmp_path, steps=100_000, train=train, mesh=MeshConfig(-1, 1, 1), mechanisms=()
    )
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    cloud.pod("create", "--type", "v6e-8")
    started = cloud.pod("start", "--", "--config", str(settings), "--output", config.output)
    assert started.returncode == 0, started.stderr
    pids = cloud.pids()
    wait_until(lambda: metrics.exists() and max(tiny.logged(config.output), default=0) >= 3, 600)
    os.kill(pids[1], signal.SIGTERM)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    step = max(tiny.logged(config.output))
    logs = "\n".join(path.read_text() for path in cloud.folder.glob("*/nalora-run/log"))
    assert cloud.pod("status").stdout.count(": ended, status 143: ") == 2, logs
    assert f"interrupted by SIGTERM; saved step {step}; continue with" in logs

    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    run(replace(config, resume="auto", steps=step + 3))
    assert f'"resumed": {{"step": {step},' in metrics.read_text()
    assert max(tiny.logged(config.output)) == step + 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
