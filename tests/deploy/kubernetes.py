"""What Kubernetes requires of a Job's template, and what the controllers of Jobs and JobSets do with exit statuses.

`run` does what the controllers do when a pod ends (kubernetes-sigs/jobset at 08dfbdf:
pkg/controllers/failure_policy.go).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any


def job_violations(name: str, replicated: dict[str, Any]) -> Iterator[str]:
    """Returns why the template of a replicated job would be refused."""
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    longest = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}-{job['completions'] - 1}-abcde"
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", longest):
        yield f"pod name {longest}"
    if "podFailurePolicy" in job and pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        codes = rule["onExitCodes"]
        if codes["operator"] not in ("In", "NotIn") or rule["action"] not in ("FailJob", "Ignore", "Count"):
            yield f"podFailurePolicy: {rule}"
        if 0 in codes["values"] or codes["values"] != sorted(set(codes["values"])):
            yield f"podFailurePolicy: values {codes['values']}"
        if codes["containerName"] not in [container["name"] for container in pod["containers"]]:
            yield f"podFailurePolicy: no container {codes['containerName']}"


def run(resource: dict[str, Any], statuses: Sequence[int]) -> tuple[str, int]:
    """Returns the outcome of a JobSet of one pod ("Completed" or "Failed"), and the number of restarts.

    Args:
      resource: the JobSet.
      statuses: the exit status of the pod at each start.
    """
    policy = resource["spec"]["failurePolicy"]
    spec = resource["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["backoffLimit"] == 0
    for restarts, status in enumerate(statuses):
        if status == 0:
            return "Completed", restarts
        reason = reason_of(spec, status)
        rules = [rule for rule in policy.get("rules", []) if reason in rule["onJobFailureReasons"]]
        action = rules[0]["action"] if rules else "RestartJobSet"
        assert action in ("FailJobSet", "RestartJobSet")
        if action == "FailJobSet" or restarts == policy["maxRestarts"]:
            return "Failed", restarts
    raise AssertionError("expected more statuses")


def reason_of(spec: dict[str, Any], status: int) -> str:
    """Returns why a job fails whose container ends with ``status``."""
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        codes = rule["onExitCodes"]
        assert (rule["action"], codes["operator"]) == ("FailJob", "In")
        if status in codes["values"]:
            return "PodFailurePolicy"
    return "BackoffLimitExceeded"
