"""One run of two processes on a tiny model: preempted on a TPU slice, resumed and preempted under Slurm, ended on GKE.

Each launcher starts two real processes over loopback, and each but the last is stopped by a SIGTERM that one or both of
them receive. The last one completes the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests import tiny
from tests.deploy import kubernetes, sandbox
from tests.deploy.conftest import ZONE, Cloud, free_port


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


def test_a_run_is_preempted_and_resumed_on_tpu_slurm_and_gke(make_cloud, tmp_path: Path) -> None:
    cloud = make_cloud()
    words, run = flags(cloud.shared), cloud.shared / "run"
    cloud.pod("create", "pod", *ZONE, "--type", "v6e-8")

    preempted_on_a_slice(cloud, run, [*words, "--steps", "100000"])
    preempted_under_slurm(cloud, run, [*words, "--steps", "100000"], tmp_path)
    last = last_step(run) + 3
    completed_on_gke(cloud, [*words, "--steps", str(last)], tmp_path)
    assert last_step(run) == last
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert (run / "metrics.jsonl").read_text().count('"resumed"') == 2


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


def preempted_under_slurm(cloud: Cloud, run: Path, words: list[str], folder: Path) -> None:
    """Two tasks resume the run and receive SIGTERM: the job is put back into the queue."""
    step = last_step(run)
    commands = folder / "slurm"
    commands.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        sandbox.write_program(commands / name, "slurm")
    home, settings, variables = environment_of(cloud)
    node = {
        "home": str(home),
        "shared": settings["shared"],
        "commands": settings["commands"],
        "variables": variables,
    }
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin",
        "NALORA_ENV": str(home / "nalora-env"),
        "NODE": json.dumps(node),
        "REQUEUED": str(folder / "requeued"),
        "REQUEUES": "0",
        "SRUN_PID": str(folder / "srun_pid"),
        "DEPLOY_RECORD": str(cloud.record.path),
        "SLURM_JOB_ID": str(free_port()),  # the port of JAX's coordinator follows from it
    }
    sizes = ["--nodes", "1", "--ntasks-per-node", "2", "--gpus-per-node", "2"]
    command = [str(commands / "sbatch"), *sizes, str(sandbox.ROOT / "deploy" / "slurm.sbatch"), *words]
    with (folder / "slurm.log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    wait_for_step(run, step + 3, lambda: job.poll() is None)
    os.kill(int((folder / "srun_pid").read_text()), signal.SIGTERM)
    assert job.wait(60) == 143
    assert f"resumed from step {step}" in (folder / "slurm.log").read_text()
    assert (folder / "requeued").read_text() == environment["SLURM_JOB_ID"]


def completed_on_gke(cloud: Cloud, words: list[str], folder: Path) -> None:
    """Two pods with the JobSet's own arguments, followed by ``words``, complete the run."""
    resource = yaml.safe_load((sandbox.ROOT / "deploy" / "jobset.yaml").read_text())
    resource["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = 2
    home, settings, variables = environment_of(cloud)
    variables |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}

    def start(job: int, index: int, arguments: list[str]) -> subprocess.Popen:
        pod_variables = variables | {"JAX_PROCESS_ID": str(index)}
        pod = sandbox.Machine(home, Path(settings["shared"]), Path(settings["commands"]), pod_variables)
        command = pod.command([str(home / "nalora-env" / "bin" / "nalora"), *arguments, *words])
        with (folder / f"pod-{index}.log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    assert kubernetes.run(resource, start) == ("Completed", 0), (folder / "pod-0.log").read_text()


def environment_of(cloud: Cloud) -> tuple[Path, dict, dict[str, str]]:
    """Returns the home of the first worker, the cloud's settings and variables without those of a TPU slice."""
    settings = json.loads((cloud.folder / "machines.json").read_text())
    jax = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    variables = {name: value for name, value in settings["workers"]["pod-0"].items() if name not in jax}
    return cloud.home("pod-0"), settings, variables


def runs(pids: list[int]) -> bool:
    """Returns True if one of the processes lives."""
    return any(Path(f"/proc/{pid}").exists() for pid in pids)
