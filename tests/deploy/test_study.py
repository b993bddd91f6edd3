"""The files of deploy/ that run a study on several hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.cli.parser import StudyArgs
from tests.deploy import kubernetes
from tests.deploy.sandbox import ROOT

STUDY = "studies/llama_8b_commonsense"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    resource = yaml.safe_load((ROOT / "deploy" / "study_job.yaml").read_text())
    assert (resource["apiVersion"], resource["kind"]) == ("batch/v1", "Job")
    return resource


def test_pods_of_the_job_run_a_committed_study_on_a_shared_volume(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ((mount,), (volume,)) = container["volumeMounts"], pod["volumes"]
    verb, args = parse(container["args"])
    assert isinstance(args, StudyArgs)
    assert (verb, args.action, args.together) == ("study", "run", 0)
    assert mount["name"] == volume["name"]
    assert Path(mount["mountPath"]) in args.study.parents
    assert str(args.study).endswith(STUDY)
    assert (ROOT / STUDY / "protocol.toml").exists()


def test_a_usage_error_fails_the_job_and_a_lost_pod_is_replaced(job: dict[str, Any]) -> None:
    spec = job["spec"]
    replicated = {"name": "pod", "replicas": 1, "template": {"spec": spec}}
    assert list(kubernetes.job_violations(job["metadata"]["name"], replicated)) == []
    assert spec["completionMode"] == "Indexed"  # required by backoffLimitPerIndex
    assert spec["backoffLimitPerIndex"] > 0
    assert kubernetes.reason_of(spec, 2) == "PodFailurePolicy"
    assert kubernetes.reason_of(spec, 143) == "BackoffLimitExceeded"


@pytest.mark.parametrize("name", ["study.sbatch", "slurm.sbatch"])
def test_a_job_is_requeued_and_each_of_its_tasks_has_one_gpu_or_the_node(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert "requeue" in options
    assert options["signal"].startswith("TERM@")  # the time limit, too, ends with status 143
    if name == "slurm.sbatch":
        assert (
            options["ntasks-per-node"] == options["gpus-per-node"]
        )  # JAX gives task i of a node its GPU i
    else:
        assert (options["nodes"], options["ntasks-per-node"]) == ("1", "1")
        assert "array" in options
        assert '"$nalora" study run "$@"' in text
