"""A run whose terminal, pipe or standard streams go away trains on and saves."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nalora_jax.config import TrainConfig
from tests import tiny

ROOT = Path(__file__).parents[2]


# Makes the terminal on standard input the process's own: closing the terminal's other end then sends SIGHUP.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
TAKE_TERMINAL += "os.execv(sys.argv[1], sys.argv[1:])"


def start_run(folder: Path, prefix: Sequence[str], **options: Any) -> subprocess.Popen:
    """A run of 40 steps, with a checkpoint every two; ``prefix`` starts the command."""
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2, keep=50)
    config = replace(tiny.make_config(folder), steps=40, train=train, mechanisms=())
    settings = tiny.write_settings(config, folder / "settings.py")
    environment = {**os.environ, "NALORA_CACHE": tiny.new_cache(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"XLA_FLAGS": tiny.xla_options.flags(1), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [*prefix, sys.executable, "-m", "nalora_jax", "train", "--config", str(settings)]
    return subprocess.Popen(command, env=environment, **options)


def wait_for_step(folder: Path, process: subprocess.Popen, step: int = 1) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(tiny.losses(folder / "run")) >= step):
        assert process.poll() is None, process.returncode
        time.sleep(0.02)


def check_finished(folder: Path, process: subprocess.Popen) -> None:
    assert process.wait(120) == 0
    assert (folder / "run" / "checkpoints" / "40").is_dir()
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "run" / "report.html").is_file()


def test_a_run_without_standard_output_outlives_its_terminal(tmp_path: Path) -> None:
    """SIGHUP, and EIO on standard error; tests/layout/test_elastic.py closes pipes."""
    mine, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    without_output = ["/bin/sh", "-c", 'exec "$@" >&-', "sh"]
    command = [sys.executable, "-c", TAKE_TERMINAL, *without_output]
    process = start_run(tmp_path, command, **streams, start_new_session=True)
    os.close(theirs)
    with os.fdopen(mine, "rb", buffering=0) as screen:
        wait_for_step(tmp_path, process)
        screen.read(1)
    check_finished(tmp_path, process)
