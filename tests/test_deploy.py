"""The files in deploy/, as far as they can be checked without the machines that they are for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.cli.parser import TrainArgs
from nalora_jax.config import RunConfig, check

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def settings(arguments: list[str]) -> RunConfig:
    verb, args = parse(arguments)
    assert verb == "train"
    assert isinstance(args, TrainArgs)
    return check(args.run)


def stand_in(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which the command ``name`` is ``script``."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_each_says_what_was_not_run_and_names_its_versions(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"Not (built and not )?run on hardware\.", text)
    assert "Python 3.11" in text
    assert "0.10.2" in text
    assert f"`{path.name}`" in (ROOT / "docs" / "deploy.md").read_text()


def test_the_pod_command_runs_the_same_command_on_all_workers(tmp_path: Path) -> None:
    script = DEPLOY / "tpu_pod.sh"
    subprocess.run(["bash", "-n", script], check=True)
    environment = stand_in(tmp_path, "gcloud", 'printf "%s\\0" "$@"') | {"NALORA_SOURCE": "/src"}
    flags = ["--model", "a model", "--mesh.data", "1", "--mesh.fsdp", "-1", "--steps", "7"]
    done = subprocess.run(
        [script, "slice", "zone", "bucket", "runs/one", *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *start, worker, end = done.stdout.split("\0")
    assert end == ""
    assert start == ["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone", "zone", "--worker=all", "--command"]
    subprocess.run(["bash", "-n"], input=worker, text=True, check=True)
    config = settings(shlex.split(worker.splitlines()[-1])[2:])
    assert (config.model, config.steps, config.output, config.resume) == ("a model", 7, "/mnt/nalora/runs/one", "auto")
    assert "nalora_jax[tpu] @ " in worker
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (75, True), (134, True), (143, True)])
def test_slurm_requeues_what_was_interrupted_and_nothing_else(tmp_path: Path, status: int, requeued: bool) -> None:
    script = DEPLOY / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    environment = stand_in(tmp_path, "srun", f'printf "%s\\n" "$@"; exit {status}') | {"SLURM_JOB_ID": "9"}
    environment.pop("NALORA_ENV", None)
    command = [script, "--model", "m", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
    keep, nalora, *arguments = done.stdout.splitlines()
    assert (keep, nalora) == ("--kill-on-bad-exit=0", f"{tmp_path}/nalora/bin/nalora")
    config = settings(arguments)
    assert (config.model, config.resume, config.mesh.fsdp) == ("m", "auto", -1)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")
    assert "#SBATCH --requeue\n" in script.read_text()


def chips(topology: str) -> int:
    x, y = map(int, topology.split("x"))
    return x * y


def test_the_jobset_is_one_and_its_hosts_chips_and_volumes_agree() -> None:
    job: dict[str, Any] = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(job["spec"]) == {"failurePolicy", "replicatedJobs"}
    (replicated,) = job["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    batch = replicated["template"]["spec"]
    assert set(batch) == {"parallelism", "completions", "backoffLimit", "template"}
    pod = batch["template"]["spec"]
    (container,) = pod["containers"]
    tpus = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert batch["parallelism"] == batch["completions"] == chips(topology) / tpus
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounted = container["volumeMounts"][0]["mountPath"]
    config = settings(container["args"])
    assert config.resume == "auto"
    assert config.train.batch_size % chips(topology) == 0
    for path in (config.output, config.model, config.data.dataset, container["env"][0]["value"]):
        assert path.startswith(mounted)


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_docker_files_install_extras_and_copy_files_that_exist(kind: str) -> None:
    text = (DEPLOY / f"Dockerfile.{kind}").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} == {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources)
    (jax_extra, own_extra) = re.findall(r'"(?:jax)?\.?\[(\w+)\]', text)
    assert own_extra in PROJECT["optional-dependencies"]
    assert any(one.startswith(f"jax[{jax_extra}]") for one in PROJECT["optional-dependencies"][own_extra])
    version = re.search(r"ARG JAX_VERSION=0\.(\d+)\.\d+", text)
    assert version
    assert 10 <= int(version[1]) < 13
    python = re.search(r"FROM python:3\.(\d+)-", text)
    assert python
    assert int(python[1]) >= 11
    assert 'ENTRYPOINT ["nalora"]' in text
    assert "nalora" in PROJECT["scripts"]
    example = re.search(rf"nalora-{kind}:0\.1\.0 (train .*)", text)
    assert example
    assert settings(shlex.split(example[1])).resume == "auto"
