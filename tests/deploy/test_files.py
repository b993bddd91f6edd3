"""Statements in the files of deploy/: Kubernetes' jobs, Slurm's jobs and the containers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.cli.parser import StudyArgs
from nalora_jax.kinds.record import check_run_config
from tests.deploy.stand_ins import ROOT

DEPLOY = ROOT / "deploy"


def job_of(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns a resource, the specification of its job, and the job's container."""
    resource = yaml.safe_load((DEPLOY / name).read_text())
    spec = resource["spec"]
    if resource["kind"] == "JobSet":
        (replicated,) = spec["replicatedJobs"]
        spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return resource, spec, container


JOBS = {"jobset.yaml": 1, "jobset_multislice.yaml": 2, "study_job.yaml": 0}


@pytest.mark.parametrize(("name", "replicas"), JOBS.items())
def test_jobs_restart_lost_hosts_only_and_have_the_hosts_chips_and_flags_that_agree(
    name: str, replicas: int
) -> None:
    """A usage error fails a job at once, as Kubernetes' controllers of Jobs and JobSets read it.

    See failure_policy.go of kubernetes-sigs/jobset.
    """
    resource, spec, container = job_of(name)
    pod, (verb, args) = spec["template"]["spec"], parse(container["args"])
    exits = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert spec["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": exits}]}
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
    if not replicas:  # pods that run a committed study on a shared volume
        assert (resource["apiVersion"], resource["kind"]) == ("batch/v1", "Job")
        assert spec["completionMode"] == "Indexed"  # required by backoffLimitPerIndex
        assert spec["backoffLimitPerIndex"] > 0
        ((mount,), (volume,)) = container["volumeMounts"], pod["volumes"]
        assert isinstance(args, StudyArgs)
        assert (verb, args.action, args.together) == ("study", "run", 0)
        assert mount["name"] == volume["name"]
        assert Path(mount["mountPath"]) in args.study.parents
        assert (ROOT / "studies" / args.study.name / "protocol.toml").exists()
        return
    assert resource["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    policy = resource["spec"]["failurePolicy"]
    rules = [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]]
    assert rules == [("FailJobSet", ["PodFailurePolicy"])]  # any other reason restarts all pods
    assert (spec["backoffLimit"], policy["maxRestarts"]) == (0, 50)
    assert resource["spec"]["replicatedJobs"][0]["replicas"] == replicas
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert (
        spec["parallelism"] == spec["completions"] == chips / resources["limits"]["google.com/tpu"]
    )
    assert pod["terminationGracePeriodSeconds"] >= 60
    config = check_run_config(args.run)
    assert (verb, config.resume) == ("train", "auto")
    assert config.train.batch_size % (chips * replicas) == 0
    assert all(str(place).startswith("gs:/") for place in (config.output, config.data.dataset))


@pytest.mark.parametrize("name", ["study.sbatch", "slurm.sbatch"])
def test_a_job_is_requeued_and_each_of_its_tasks_has_one_gpu_or_the_node(name: str) -> None:
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (DEPLOY / name).read_text(), re.MULTILINE)
    )
    assert "requeue" in options
    assert options["signal"].startswith("TERM@")  # the time limit, too, ends with status 143
    if name == "slurm.sbatch":  # JAX gives task i of a node its GPU i
        assert options["ntasks-per-node"] == options["gpus-per-node"]
    else:
        assert (options["nodes"], options["ntasks-per-node"]) == ("1", "1")
        assert "array" in options


# Runs the tasks of a step one after another; returns the highest status, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>"$HOME/options"; shift; done
highest=0
for STATUS in $STATUSES; do
  export STATUS
  "$@"
  status=$?
  ((status <= highest)) || highest=$status
done
exit $highest
"""


@pytest.mark.parametrize(
    ("script", "statuses", "restarts", "status", "requeued"),
    [
        ("slurm.sbatch", "1 75 134", 0, 255, ""),  # a task crashed, and the others noticed
        ("slurm.sbatch", "75 134 75", 0, 134, "requeue 9"),
        ("slurm.sbatch", "143 143", 19, 143, "requeue 9"),
        ("study.sbatch", "143", 19, 143, "requeue 9_1"),
        ("study.sbatch", "143", 20, 143, ""),
    ],
)
def test_slurm_requeues_interrupted_jobs_only(
    tmp_path: Path, script: str, statuses: str, restarts: int, status: int, requeued: str
) -> None:
    commands = {"scontrol": '#!/bin/bash\necho "$*" >"$HOME/requeued"\n', "srun": SRUN}
    for name, text in (commands | {"bin/nalora": "#!/bin/bash\nexit $STATUS\n"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"HOME": str(tmp_path), "NALORA_ENV": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    environment |= {
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_RESTART_COUNT": str(restarts),
        "STATUSES": statuses,
    }
    done = subprocess.run(["bash", DEPLOY / script, "x"], env=environment, check=False)
    assert "--cpus-per-task=8" in (tmp_path / "options").read_text().split()
    found = tmp_path / "requeued"
    assert (done.returncode, found.read_text().strip() if found.exists() else "") == (
        status,
        requeued,
    )


@pytest.mark.parametrize(
    ("file", "copies", "installer"),
    [
        ("Dockerfile.tpu", "^COPY (.*) .*$", "Dockerfile.tpu"),
        ("Dockerfile.cuda", "^COPY (.*) .*$", "Dockerfile.cuda"),
        ("tpu_pod.sh", r'-C "\$here/\.\." (.*)$', "tpu_worker.sh"),
    ],
)
def test_what_pip_needs_is_copied_and_extras_exist(file: str, copies: str, installer: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.findall(copies, (DEPLOY / file).read_text(), re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    assert {"pyproject.toml", "nalora_jax", project["readme"], *project["license-files"]} <= copied
    assert all((ROOT / name).exists() for name in copied)
    installs = r"""["'](jax\[\w+\])==.*["'] ["'].*\[(\w+),gcs,datasets\]["']"""
    pinned, extra = re.search(installs, (DEPLOY / installer).read_text()).groups()
    assert project["optional-dependencies"][extra][0].startswith(pinned)
    assert {"gcs", "datasets"} <= set(project["optional-dependencies"])
