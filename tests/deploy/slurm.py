"""Stands in for sbatch, srun and scontrol on one node: a job's tasks are sandboxes.

The variables are those that JAX reads (jax/_src/clusters/slurm_cluster.py) with Slurm's meaning. Options of the file's
#SBATCH lines and of the command line are those of Slurm's manual; an unknown one ends in an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
from pathlib import Path

from tests.deploy.sandbox import Machine, from_environment, send

COUNTS = ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task")
TEXTS = ("--job-name", "--time", "--signal", "--open-mode")


def main(program: str, *words: str) -> int:
    """Executes the stand-in for ``sbatch``, ``srun`` or ``scontrol``."""
    from_environment().add(program, words)
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[program](*words)


def options_of(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns sbatch's options in ``words``, and the words that follow them."""
    parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    for name in COUNTS:
        parser.add_argument(name, type=int)
    for name in TEXTS:
        parser.add_argument(name)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("job", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    return args, args.job


def sbatch(*words: str) -> int:
    """Runs a job, and again if it was requeued and the test wants that; returns its exit status."""
    given, (script, *arguments) = options_of(list(words))
    lines = re.findall(r"^#SBATCH (\S+)$", Path(script).read_text(), re.MULTILINE)
    job, _ = options_of(lines)
    tasks = (given.nodes or job.nodes) * (given.ntasks_per_node or job.ntasks_per_node)
    gpus = given.gpus_per_node or job.gpus_per_node
    assert gpus == (given.ntasks_per_node or job.ntasks_per_node)  # JAX gives task i of a node its GPU i
    assert job.requeue
    assert job.signal.startswith("TERM@")
    requeued, again = Path(os.environ["REQUEUED"]), int(os.environ["REQUEUES"])
    variables = {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(gpus)}
    variables |= {"SLURM_CPUS_PER_TASK": str(given.cpus_per_task or job.cpus_per_task)}
    for _ in range(again + 1):
        requeued.unlink(missing_ok=True)
        status = subprocess.run(
            ["bash", script, *arguments], env=os.environ | variables, check=False
        ).returncode
        if not requeued.exists():
            break
    return status


def srun(option: str, cpus: str, *words: str) -> int:
    """Runs ``words`` as all tasks of the job; a SIGTERM goes to all of them. Returns the largest exit status.

    Only the program that Slurm started gets the signal, not its children, as with proctrack/cgroup.
    """
    assert option == "--kill-on-bad-exit=0"
    assert cpus == f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}"
    node, count = json.loads(os.environ["NODE"]), int(os.environ["SLURM_NTASKS"])
    shared = {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}
    shared |= {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = []
    for index in range(count):
        variables = node["variables"] | shared | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        machine = Machine(Path(node["home"]), Path(node["shared"]), Path(node["commands"]), variables)
        tasks.append(subprocess.Popen(machine.command(words)))
    signal.signal(signal.SIGTERM, lambda number, frame: [send(task, number) for task in tasks])
    Path(os.environ["SRUN_PID"]).write_text(str(os.getpid()))  # Slurm signals a job's steps, not its script
    return max(task.wait() for task in tasks)


def scontrol(verb: str, job: str) -> int:
    """Marks the job as requeued."""
    assert (verb, job) == ("requeue", os.environ["SLURM_JOB_ID"])
    Path(os.environ["REQUEUED"]).write_text(job)
    return 0
