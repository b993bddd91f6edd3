"""A run of two processes on a tiny model that the launcher starts, and that is preempted and resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.__main__ import main
from tests import tiny
from tests.deploy.conftest import ZONE, Cloud


def last_step(run: Path) -> int:
    """Returns the last step in the log of a run, 0 before the first."""
    try:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0
    return max((line["step"] for line in lines if "loss" in line), default=0)


def wait_for_step(run: Path, step: int, alive: Callable[[], bool]) -> None:
    """Waits until a run has logged ``step``."""
    until = time.monotonic() + 600
    while last_step(run) < step:
        assert alive(), "the run ended"
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def flags(folder: Path) -> list[str]:
    """Flags of a run on the model and the questions in ``folder``, which are made."""
    tiny.make_model(folder / "model")
    tiny.make_questions(folder / "questions.jsonl")
    values = {
        "--model": folder / "model",
        "--output": folder / "run",
        "--data.dataset": folder / "questions.jsonl",
        "--data.train-split": "train[:80%]",
        "--data.eval-split": "train[80%:]",
        "--data.max-length": 16,
        "--data.eval-limit": 4,
        "--data.select-limit": 2,
        "--train.batch-size": 8,
        "--train.log-every": 1,
        "--train.eval-every": 0,
        "--train.save-every": 100000,
        "--lora.rules": "ffn:4",
        "--compute.dtype": "float32",
    }
    return [str(word) for pair in values.items() for word in pair]


def logs(cloud: Cloud) -> str:
    """Returns the logs of all workers."""
    return "\n".join(path.read_text() for path in cloud.folder.glob("*/nalora-run/log"))


def test_a_run_is_preempted_on_a_slice_and_one_process_completes_it(
    make_cloud: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = make_cloud()
    words, run = flags(cloud.shared), cloud.shared / "run"
    cloud.pod("create", "pod", *ZONE, "--type", "v6e-8")
    preempted_on_a_slice(cloud, run, [*words, "--steps", "100000"])
    step = last_step(run)
    monkeypatch.setenv("NALORA_CACHE", str(cloud.shared / "cache"))
    assert main(["train", *words, "--resume", "auto", "--steps", str(step + 3)]) == 0
    assert f"resumed from step {step}" in capsys.readouterr().err
    assert last_step(run) == step + 3
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def preempted_on_a_slice(cloud: Cloud, run: Path, words: list[str]) -> None:
    """One worker receives SIGTERM, as if its machine were reclaimed: both save and exit with status 143."""
    started = cloud.pod("start", "pod", *ZONE, "--", *words)
    assert started.returncode == 0, started.stderr
    pids = cloud.pids()
    wait_for_step(run, 3, lambda: runs(pids))
    os.kill(pids[1], signal.SIGTERM)
    until = time.monotonic() + 60
    while runs(pids):
        assert time.monotonic() < until, logs(cloud)
        time.sleep(0.05)
    assert cloud.pod("status", "pod", *ZONE).stdout.count(": ended, status 143: ") == 2, logs(cloud)
    assert f"interrupted by SIGTERM; saved step {last_step(run)}; continue with" in logs(cloud)


def runs(pids: list[int]) -> bool:
    """Returns True if one of the processes lives."""
    return any(Path(f"/proc/{pid}").exists() for pid in pids)
