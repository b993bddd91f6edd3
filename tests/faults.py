"""What happens to a run when something breaks: each fault is made many times; docs/checkpoints.md
gets the outcomes.

    python -m tests.faults --times 5        # some 10 minutes on two cores

A run that was interrupted and continued is "identical" where its adapter files have the bytes of a
run left alone. What should not be is said in capitals; exits with status 1 where something was.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.markers import write_between
from nalora_jax.config import ComputeConfig, RLConfig, RunConfig, TrainConfig
from tests import tiny

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
BEGIN, END = "<!-- faults: python -m tests.faults -->", "<!-- end of faults -->"
STEPS = 40
# Imported by a run with rewards: ends the process a given time after a given call of a phase has
# begun.
KILLER = """
import itertools, os, signal, threading
from functools import partial

from nalora_jax.train import checkpoint, rollout
from nalora_jax.kinds import rl
from nalora_jax.kinds.rl.rewards import register_reward

phase, at, delay = os.environ.get("NALORA_FAULT", "none 0 0").split()
calls = itertools.count(1)


def dying(function, name):
    def wrapped(*arguments, **options):
        if name == phase and next(calls) == int(at):
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*arguments, **options)
    return wrapped


def letters(prompt, completion, record):
    words = completion.split()
    return sum(word < "m" for word in words) / max(len(words), 1)


class Step(rl.RolloutStep):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._update = dying(self._update, "update")


register_reward("letters")(dying(letters, "reward"))
rl.RolloutStep, rl.Sampler = Step, partial(rl.Sampler, rows=4)  # a prompt in each program
rollout.sample_groups = dying(rollout.sample_groups, "rollout")
checkpoint.Checkpointer.save = dying(checkpoint.Checkpointer.save, "save")
"""
# Calls of each phase in such a run of 12 steps, 6 rollouts of 4 prompts with 4 samples, and 4
# checkpoints.
CALLS = {"rollout": 24, "reward": 100, "update": 12, "save": 4}
REWARDED: dict[str, Any] = {
    "rl": RLConfig(rewards=("letters",), samples=4, max_new_tokens=6, updates=2),
    "train": TrainConfig(batch_size=16, log_every=1, eval_every=0, save_every=3),
    "compute": ComputeConfig(dtype="float32"),
    "steps": 12,
}


class Place:
    """A folder with a model, questions, and runs that were left alone."""

    def __init__(self, folder: Path) -> None:
        os.environ["NALORA_CACHE"] = tiny.new_cache(folder / "cache")
        self.folder, self.count, self.alone = folder, 0, dict[str, Path]()
        self.config = tiny.make_config(folder, steps=STEPS)
        (folder / "killer.py").write_text(KILLER)

    def start(self, config: RunConfig, **variables: str) -> subprocess.Popen:
        settings = tiny.write_settings(config, self.folder / "settings.py")
        command = ["-m", "nalora_jax", "train", "--config", str(settings)]
        if config.rl.rewards:
            command += ["--import", str(self.folder / "killer.py")]
        (process,) = tiny.start(command, **variables)
        return process

    def new_run(self, **changes: Any) -> RunConfig:
        """The settings of another run, which takes itself up where there is something to take
        up."""
        self.count += 1
        output = str(self.folder / f"run-{self.count}")
        return replace(self.config, output=output, resume="auto", **changes)

    def verdict(self, kind: str, config: RunConfig, *files: str) -> str:
        """Continues the run and compares ``files`` with those of a run of its kind that was left
        alone."""
        if kind not in self.alone:
            whole = replace(config, output=str(self.folder / kind))
            assert tiny.finish([self.start(whole)])[0][0] == 0
            self.alone[kind] = Path(whole.output)
        ((status, _, error),) = tiny.finish([self.start(config)])
        if status:
            return f"FAILED to resume: {error.splitlines()[-1]}"
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", *files):
            if (Path(config.output) / name).read_bytes() != (self.alone[kind] / name).read_bytes():
                return "resumed, DIFFERENT"
        return "resumed, identical"


def killed(place: Place, rng: random.Random) -> str:
    """SIGKILL at a random moment of the steps, then the same command again"""
    config = place.new_run()
    process = place.start(config)
    tiny.wait_for_line(process, f"step {rng.randrange(2, STEPS - 4)}/")
    time.sleep(rng.random() / 20)
    process.send_signal(signal.SIGKILL)
    tiny.finish([process])
    return place.verdict("text", config)


def terminated(place: Place, rng: random.Random) -> str:
    """SIGTERM at a random step and again within a second, then the same command again"""
    config = place.new_run()
    process = place.start(config)
    tiny.wait_for_line(process, f"step {rng.randrange(2, STEPS - 4)}/")
    process.send_signal(signal.SIGTERM)
    time.sleep(rng.random())
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    ((status, _, error),) = tiny.finish([process])
    said = re.search(r"interrupted by SIGTERM; saved step \d+; continue with", error)
    printed = "printed the command to resume" if said else "SILENT"
    return f"status {status}, {printed}, {place.verdict('text', config)}"


def rewards(place: Place, rng: random.Random) -> str:
    """SIGKILL in a rollout, reward, update or save of a run with rewards, then the same command
    again"""
    config = place.new_run(**REWARDED, data=replace(place.config.data, max_length=0))
    phase = rng.choice(list(CALLS))
    fault = f"{phase} {rng.randrange(1, CALLS[phase])} {rng.random() / 50}"
    ((status, _, _),) = tiny.finish([place.start(config, NALORA_FAULT=fault)])
    killed = "killed" if status == -signal.SIGKILL else "NOT KILLED"
    return f"{killed} in {phase}, {place.verdict('rewards', config, 'rollouts.jsonl')}"


# Fault, and how many times it is made for one of --times.
FAULTS: dict[Callable[[Place, random.Random], str], int] = {killed: 1, terminated: 1, rewards: 6}


def main() -> int:
    """Makes the faults and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[fault.__name__ for fault in FAULTS])
    given = parser.parse_args()
    earlier = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    rows, failed = {line.split(" | ")[0]: line for line in earlier if line.startswith("| ")}, False
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for fault, factor in FAULTS.items():
            if fault.__name__ not in given.only:
                continue
            rng = random.Random(0)
            outcomes = Counter(
                " ".join(fault(place, rng).split()) for _ in range(given.times * factor)
            )
            told = "; ".join(f"{count}: {outcome}" for outcome, count in outcomes.most_common())
            key = f"| {fault.__doc__}"
            rows[key] = f"{key} | {given.times * factor} | {told} |"
            failed |= any(re.search(r"\b[A-Z]{2,}\b", outcome) for outcome in outcomes)
            print(rows[key], flush=True)
    table = ["| fault | times | outcome |", "|---|---|---|"]
    table += [rows[key] for fault in FAULTS if (key := f"| {fault.__doc__}") in rows]
    write_between(PAGE, BEGIN, END, "\n" + "\n".join(table) + "\n")
    print(f"{PAGE}, JAX {jax.__version__}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
