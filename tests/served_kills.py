"""Kills trainer and server of a run with ``--rl.servers`` at random moments, with SIGKILL.

    python -m tests.served_kills --kills 30 --seed 0

The server is the stand-in, whose samples depend on adapter and seed alone. So the run that was
killed must equal an uninterrupted one, bit for bit. A sample that was received must not be asked
for again: the server counts requests, of which each kill may waste those in flight.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from nalora_jax.config import RLConfig, TrainConfig
from tests import tiny

STEPS = 40
PARALLEL = 16  # samples of a step, so at most twice as many in flight with a staleness of 1
RL = RLConfig(
    rewards=("regex:pattern=[a-h]",),
    samples=4,
    max_new_tokens=4,
    temperature=0.9,
    staleness=1,
    server_wait=60.0,
)
TRAIN = TrainConfig(batch_size=PARALLEL, log_every=1, eval_every=0, save_every=4)


def free_port() -> int:
    """Returns a port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Run:
    """A server and a trainer, each of which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        servers = (f"http://127.0.0.1:{self.port}",)
        rl = RLConfig(**{**vars(RL), "servers": servers})
        changes = {"rl": rl, "train": TRAIN, "steps": STEPS, "mechanisms": ()}
        config = tiny.make_config(folder, **changes, resume="auto")
        self.settings = tiny.write_settings(config, folder / "settings.py")
        self.model = config.model
        self.server = self.start_server()
        self.trainer = self.start_trainer()

    def start_server(self) -> subprocess.Popen[str]:
        arguments = ["-m", "tests.doubles.rollout_server", self.model, str(self.port)]
        with (self.folder / "server.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, *arguments, str(self.folder / "asked.jsonl")], stderr=log
            )

    def start_trainer(self) -> subprocess.Popen[str]:
        command = ["-m", "nalora_jax", "train", "--config", str(self.settings)]
        with (self.folder / "trainer.log").open("a") as log:
            return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)

    def kill(self, victim: str) -> bool:
        """Kills and restarts the trainer or the server; returns False if the run has ended."""
        if self.trainer.poll() is not None:
            return False
        process = getattr(self, victim)
        process.send_signal(signal.SIGKILL)
        process.wait()
        setattr(self, victim, getattr(self, f"start_{victim}")())
        return True

    def finish(self) -> int:
        """Waits for the trainer, ends the server, and returns the trainer's status."""
        status = self.trainer.wait(timeout=900)
        self.server.kill()
        self.server.wait()
        return status

    def asked(self) -> list[Any]:
        """Returns prompt and seed of each request of a sample."""
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [tuple(map(str, json.loads(line)[:2])) for line in lines]

    def adapter(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "run/adapter/adapter_model.safetensors")


def wait_for_step(run: Run, step: int, seconds: float) -> None:
    """Waits until a run has logged a step, then some seconds more."""
    log = run.folder / "run/metrics.jsonl"
    while run.trainer.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(f'{{"step": {step},' in line for line in lines):
            break
        time.sleep(0.05)
    time.sleep(seconds)


def compare(whole: Run, killed: Run, kills: int) -> dict[str, Any]:
    """Returns what the kills changed."""
    first = tiny.logged(whole.folder / "run", "reward")
    second = tiny.logged(killed.folder / "run", "reward")
    one, other = whole.adapter(), killed.adapter()
    asked = killed.asked()
    return {
        "kills": kills,
        "rewards_equal": first == second,
        "adapter_equal": all(np.array_equal(one[name], other[name]) for name in one),
        "samples": len(set(asked)),
        "samples_of_the_whole_run": len(set(whole.asked())),
        "asked_again": len(asked) - len(set(asked)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("whole", "killed")]
        for folder in folders:
            folder.mkdir()
        whole = Run(folders[0])
        if whole.finish():
            raise RuntimeError((whole.folder / "trainer.log").read_text()[-2000:])
        killed = Run(folders[1])
        kills = 0
        for number in range(args.kills):
            wait_for_step(killed, 1 + number * (STEPS - 2) // args.kills, rng.uniform(0, 0.5))
            kills += killed.kill(rng.choice(["trainer", "server"]))
        if killed.finish():
            raise RuntimeError((killed.folder / "trainer.log").read_text()[-2000:])
        print(json.dumps(compare(whole, killed, kills), indent=1))


if __name__ == "__main__":
    main()
