"""What happens to a run when something breaks: each fault is made many times; docs/checkpoints.md gets the outcomes.

    python -m tests.faults --times 5        # some 20 minutes on two cores

A run that was interrupted and continued is "identical" where its adapter files have the bytes of a run left alone.
What should not be is said in capitals; exits with status 1 where something was.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.markers import write_between
from nalora_jax.config import ComputeConfig, MeshConfig, RLConfig, RunConfig, TrainConfig
from tests import emulator, tiny

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
BEGIN, END = "<!-- faults: python -m tests.faults -->", "<!-- end of faults -->"
STEPS = 40
# Imported by a run with rewards: ends the process a given time after a given call of a phase has begun.
KILLER = """
import os, signal, threading
from functools import partial

from nalora_jax.train import checkpoint, rollout
from nalora_jax.train.kinds import rl
from nalora_jax.train.rewards import register_reward

phase, at, delay = os.environ.get("NALORA_FAULT", "none 0 0").split()
calls = 0


def dying(function, name):
    def wrapped(*arguments, **options):
        global calls
        calls += name == phase
        if name == phase and calls == int(at):
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
# Calls of each phase in such a run of 12 steps, 6 rollouts of 4 prompts with 4 samples, and 4 checkpoints.
CALLS = {"rollout": 24, "reward": 100, "update": 12, "save": 4}
REWARDED: dict[str, Any] = {
    "rl": RLConfig(rewards=("letters",), samples=4, max_new_tokens=6, updates=2),
    "train": TrainConfig(batch_size=16, log_every=1, eval_every=0, save_every=3),
    "compute": ComputeConfig(dtype="float32"),
    "steps": 12,
}


class Place:
    """A folder with a model, questions, and the adapter of a run that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.requests: dict[str, int] = {}  # to the bucket, of an undisturbed command
        os.environ["NALORA_CACHE"] = tiny.new_cache(folder / "cache")
        self.config = tiny.make_config(folder, steps=STEPS)
        self.whole = self.run_alone()
        self.rewarded: RunConfig | None = None  # as `whole`, with rewards

    def new_run(self, **changes: Any) -> RunConfig:
        """The settings of another run, which takes itself up where there is something to take up."""
        self.count += 1
        return replace(self.config, output=str(self.folder / f"run-{self.count}"), resume="auto", **changes)

    def start(self, config: RunConfig, count: int = 1, **variables: str) -> list[subprocess.Popen]:
        settings = tiny.write_settings(config, self.folder / f"{Path(config.output).name}.py")
        command = ["-m", "nalora_jax", "train", "--config", str(settings)]
        if config.rl.rewards:
            (self.folder / "killer.py").write_text(KILLER)
            command += ["--import", str(self.folder / "killer.py")]
        return tiny.start(command, count=count, NALORA_HEARTBEAT_TIMEOUT="10", **variables)

    def start_at(self, first: int, **changes: Any) -> tuple[RunConfig, subprocess.Popen]:
        """A run that has taken a step."""
        config = self.new_run(**changes)
        (process,) = self.start(config)
        tiny.wait_for_line(process, f"step {first}/")
        return config, process

    def train(self, config: RunConfig) -> tuple[int, str]:
        """Exit status and standard error of the run to its end."""
        return ended(self.start(config))

    def run_alone(self, **changes: Any) -> RunConfig:
        """A finished run that nothing disturbed."""
        config = self.new_run(**changes)
        expect(self.train(config)[0], 0)
        return config

    def verdict(self, config: RunConfig, whole: RunConfig | None = None, *files: str) -> str:
        """Continue the run and compare what it exports, and ``files``, with those of a whole run."""
        status, error = self.train(config)
        if status:
            return f"FAILED to resume: {error.splitlines()[-1]}"
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", *files):
            a, b = ((Path(run.output) / name).read_bytes() for run in (config, whole or self.whole))
            if a != b:
                return "resumed, DIFFERENT"
        return "resumed, identical"


def ended(processes: Sequence[subprocess.Popen]) -> tuple[int, str]:
    """Exit status and standard error of a process."""
    ((status, _, error),) = tiny.finish(processes)
    return status, error


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"expected {wanted!r}, found {found!r}")


def killed(place: Place, rng: random.Random) -> str:
    """SIGKILL at a random moment of the steps, then the same command again"""
    config, process = place.start_at(rng.randrange(2, STEPS - 4))
    time.sleep(rng.random() / 20)
    process.send_signal(signal.SIGKILL)
    ended([process])
    return place.verdict(config)


def terminated(place: Place, rng: random.Random) -> str:
    """SIGTERM at a random step and again within a second, then the same command again"""
    config, process = place.start_at(rng.randrange(2, STEPS - 4))
    process.send_signal(signal.SIGTERM)
    time.sleep(rng.random())
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    status, error = ended([process])
    said = re.search(r"interrupted by SIGTERM; saved step \d+; continue with", error)
    return (
        f"status {status}, {'printed the command to resume' if said else 'SILENT'}, {place.verdict(config)}"
    )


def rewards(place: Place, rng: random.Random) -> str:
    """SIGKILL in a rollout, reward, update or save of a run with rewards, then the same command again"""
    changes = REWARDED | {"data": replace(place.config.data, max_length=0)}
    if place.rewarded is None:
        place.rewarded = place.run_alone(**changes)
    phase = rng.choice(list(CALLS))
    config = place.new_run(**changes)
    fault = f"{phase} {rng.randrange(1, CALLS[phase])} {rng.random() / 50}"
    status, _ = ended(place.start(config, NALORA_FAULT=fault))
    killed = "killed" if status == -signal.SIGKILL else "NOT KILLED"
    return f"{killed} in {phase}, {place.verdict(config, place.rewarded, 'rollouts.jsonl')}"


def lost(place: Place, rng: random.Random) -> str:
    """one of two processes killed"""
    train = TrainConfig(batch_size=8, log_every=1, save_every=2)
    processes = place.start(place.new_run(mesh=MeshConfig(-1, 1, 1), train=train, steps=10**6), count=2)
    tiny.wait_for_line(processes[0], "step 6/")
    gone = rng.randrange(2)
    processes[gone].send_signal(signal.SIGKILL)
    began = time.monotonic()
    status, _, error = tiny.finish(processes, timeout=150)[1 - gone]
    soon = "within two minutes" if time.monotonic() - began < 120 else "LATE"
    return f"the other ends {soon}, {'non-zero' if status else 'ZERO'}{', A TRACEBACK' * ('Traceback' in error)}"


def uploaded(place: Place, rng: random.Random) -> str:
    """SIGKILL at a random request of a merge or an export to a bucket, then the same command again"""
    verb = rng.choice(["merge", "export"])

    def writing(output: str, **variables: str) -> list[subprocess.Popen]:
        command = ["-m", "nalora_jax", verb, place.whole.output, "--output", output]
        return tiny.start(command, **variables)

    reference, requests = place.folder / verb, list[tuple[str, str]]()
    if not reference.exists():
        expect(ended(writing(str(reference)))[0], 0)
    files = {path.name: path.read_bytes() for path in reference.iterdir()}
    with emulator.emulator(place.folder / "google", requests) as (held, address):
        variables = emulator.variables(address)
        if verb not in place.requests:
            expect(ended(writing("gs://bucket/first", **variables))[0], 0)
            place.requests[verb] = len(requests)
            requests.clear()
        wanted = rng.randrange(1, place.requests[verb] + 1)
        (process,) = writing("gs://bucket/result", **variables)
        while len(requests) < wanted and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.random() / 200)
        process.send_signal(signal.SIGKILL)
        ended([process])
        state, left = "absent", emulator.stored(held, "result")
        if {"config.json", "adapter_config.json"} & left.keys():  # tools load it
            state = "whole" if files.items() <= left.items() else "HALF"
        status, error = ended(writing("gs://bucket/result", **variables))
        if status == 0:
            return f"{state}; again: {'written' if emulator.stored(held, 'result') == files else 'WRONG'}"
        return f"{state}; again: {'refused' if 'found one that holds' in error else 'FAILED'}"


# Fault, and how many times it is made for one of --times.
FAULTS: dict[Callable[[Place, random.Random], str], int] = {
    killed: 1,
    terminated: 1,
    rewards: 6,
    uploaded: 6,
    lost: 1,
}


def main() -> int:
    """Make the faults and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[fault.__name__ for fault in FAULTS])
    given = parser.parse_args()
    logging.disable()
    earlier = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    rows, failed = {line.split(" | ")[0]: line for line in earlier if line.startswith("| ")}, False
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for fault, factor in FAULTS.items():
            if fault.__name__ not in given.only:
                continue
            rng = random.Random(0)
            outcomes = Counter(" ".join(fault(place, rng).split()) for _ in range(given.times * factor))
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
