"""The JobSets of deploy/: the API accepts them, and a pod's exit status decides between failure and restart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.config import check
from tests.deploy import kubernetes
from tests.deploy.sandbox import ROOT

FILES = ("jobset.yaml", "jobset_multislice.yaml")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_jobset_is_accepted(name: str) -> None:
    resource = load(name)
    assert (resource["apiVersion"], resource["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for replicated in resource["spec"]["replicatedJobs"]:
        assert list(kubernetes.job_violations(resource["metadata"]["name"], replicated)) == []


@pytest.mark.parametrize("name", FILES)
def test_hosts_chips_and_flags_agree(name: str) -> None:
    (replicated,) = load(name)["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert resources["requests"] == resources["limits"]
    assert spec["parallelism"] == spec["completions"] == chips / resources["limits"]["google.com/tpu"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    verb, args = parse(container["args"])
    config = check(args.run)
    assert (verb, config.resume) == ("train", "auto")
    assert config.train.batch_size % (chips * replicated["replicas"]) == 0
    assert replicated["replicas"] == (2 if "multislice" in name else 1)
    for place in (config.output, config.data.dataset):
        assert str(place).startswith("gs:/")


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ([0], ("Completed", 0)),
        ([2], ("Failed", 0)),
        ([143, 0], ("Completed", 1)),
        ([75, 134, 1, 0], ("Completed", 3)),
        ([143, 2], ("Failed", 1)),
        ([143] * 51, ("Failed", 50)),
    ],
)
def test_a_usage_error_fails_at_once_and_a_lost_host_restarts(
    statuses: list[int], outcome: tuple[str, int]
) -> None:
    assert kubernetes.run(load("jobset.yaml"), statuses) == outcome
