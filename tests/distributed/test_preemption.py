"""Two real processes that lose one of them, or are told to stop."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

from nalora_jax.config import MeshConfig, TrainConfig
from tests import tiny


def test_a_lost_process_ends_the_other_with_one_line_and_sigterm_to_one_saves_in_both(tmp_path: Path) -> None:
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2)
    config = replace(tiny.make_config(tmp_path), steps=10**6, mesh=MeshConfig(-1, 1, 1), train=train, resume="auto")
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    command = ["-m", "nalora_jax", "train", "--config", str(settings)]
    variables = {"NALORA_CACHE": tiny.new_cache(tmp_path / "cache"), "NALORA_HEARTBEAT_TIMEOUT": "10"}
    saved = tmp_path / "run" / "checkpoints"

    first, second = tiny.start(command, count=2, **variables)
    tiny.wait_for_line(first, "step 6/")
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    (status, _, error), _ = tiny.finish([first, second], timeout=120)
    assert time.monotonic() - began < 120
    assert status not in (0, -signal.SIGKILL)
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, error
    assert "found that one is gone" in said[0]
    assert "--resume" in said[0]
    assert "Traceback" not in error
    assert "stack trace" not in error
    kept = max(int(path.name) for path in saved.iterdir() if path.name.isdecimal())

    first, second = tiny.start(command, count=2, **variables)
    tiny.wait_for_line(first, f"step {kept + 3}/")
    for process in (first, second):  # a dropped connection
        process.send_signal(signal.SIGHUP)
    second.stdout.close()
    second.stderr.close()
    tiny.wait_for_line(first, f"step {kept + 5}/")
    second.send_signal(signal.SIGTERM)
    (status, _, error), (other, _, _) = tiny.finish([first, second])
    assert (status, other) == (143, 143), error
    assert f"resumed from step {kept}" in error
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in lines if "loss" in line)
    assert f"interrupted by SIGTERM; saved step {last}; continue with --output {config.output} --resume" in error
    assert max(int(path.name) for path in saved.iterdir()) == last
