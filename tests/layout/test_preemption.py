"""Two real processes whose terminal goes away, and which lose one of them."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

from nalora_jax.config import MeshConfig, TrainConfig
from tests import tiny


def test_a_lost_terminal_ends_no_process_and_a_lost_process_ends_the_other_with_one_line(
    tmp_path: Path,
) -> None:
    """tests/deploy/test_resume.py sends SIGTERM to one of two processes, and resumes."""
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2)
    config = replace(
        tiny.make_config(tmp_path, mechanisms=()),
        steps=10**6,
        mesh=MeshConfig(-1, 1, 1),
        train=train,
        resume="auto",
    )
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    command = ["-m", "nalora_jax", "train", "--config", str(settings)]
    variables = {"NALORA_CACHE": tiny.new_cache(tmp_path / "cache"), "NALORA_HEARTBEAT_TIMEOUT": "10"}

    first, second = tiny.start(command, count=2, **variables)
    tiny.wait_for_line(first, "step 2/")
    for process in (first, second):  # a dropped connection
        process.send_signal(signal.SIGHUP)
    second.stdout.close()
    second.stderr.close()
    tiny.wait_for_line(first, "step 6/")
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    (status, _, error), _ = tiny.finish([first, second], timeout=120)
    assert time.monotonic() - began < 120
    assert status not in (0, -signal.SIGKILL)
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    # A collective fails, or JAX's coordination service ends the process from C++.
    assert all("found that one is gone" in line and "--resume" in line for line in said), error
    assert said or "coordination service" in error, error
    assert "Traceback" not in error
    steps = [
        int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()
    ]
    assert max(steps) >= 4
