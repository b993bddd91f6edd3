"""A run of two processes that share every row loses one of them, and continues on a mesh of eight
devices."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from nalora_jax import run
from nalora_jax.config import MeshConfig, TrainConfig
from tests import tiny

# The second process stops before its eighth step, so that the first waits for it.
STALLED = """
import time
import jax
from nalora_jax.train import loop

if "pytest" not in sys.modules:
    run_steps = loop.run_steps

    def stalled(step, *arguments, **options):
        done = 0

        def counted(*inner):
            nonlocal done
            done += 1
            time.sleep(600 * (done == 8 and jax.process_index() == 1))
            return step(*inner)

        return run_steps(counted, *arguments, **options)

    loop.run_steps = stalled
"""


def test_a_run_that_loses_one_of_two_processes_continues_on_eight_devices(
    tmp_path, monkeypatch
) -> None:
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=4)
    config = tiny.make_config(
        tmp_path, steps=8, train=train, mesh=MeshConfig(1, 1, 1, 2), resume="auto"
    )
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    settings.write_text(f"{settings.read_text()}\n{STALLED}")
    command = ["-m", "nalora_jax", "train", "--config", str(settings)]
    variables = {
        "NALORA_CACHE": tiny.new_cache(tmp_path / "cache"),
        "NALORA_HEARTBEAT_TIMEOUT": "10",
    }
    variables["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    first, second = tiny.start(command, count=2, **variables)
    tiny.wait_for_line(first, "step 2/")
    for process in (first, second):  # the terminal is gone
        process.send_signal(signal.SIGHUP)
    second.stdout.close()
    second.stderr.close()
    tiny.wait_for_line(first, "step 6/")
    second.send_signal(signal.SIGKILL)
    (status, _, error), _ = tiny.finish([first, second], timeout=120)
    assert status not in (0, -signal.SIGKILL)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    # A collective fails, or JAX's coordination service ends the process from C++.
    assert all("found that one is gone" in line and "--resume" in line for line in lines), error
    assert lines or "coordination service" in error, error
    assert "Traceback" not in error
    before = tiny.logged(config.output)
    assert max(before) >= 6
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    run(replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    assert '"resumed": {"step": 4' in (tmp_path / "run" / "metrics.jsonl").read_text()
    continued = tiny.logged(config.output)
    assert continued.keys() == set(range(1, 9))
    for step in (5, 6):  # by both
        assert continued[step] == pytest.approx(before[step], rel=2e-4)
