"""What the API of Kubernetes accepts, and what the controllers of Jobs and JobSets do with exit statuses.

`violations` states what the custom resource definition and the webhook of JobSet accept (kubernetes-sigs/jobset at
08dfbdf: config/components/crd, pkg/webhooks/jobset_webhook.go), and what the Job API requires of podFailurePolicy.
`run` does what the controllers do when a pod ends (pkg/controllers/failure_policy.go).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}
ACTIONS = {
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
}
FIELDS = {
    "spec": {
        *(
            "replicatedJobs",
            "network",
            "successPolicy",
            "failurePolicy",
            "startupPolicy",
            "suspend",
            "coordinator",
        ),
        *("managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"),
    },
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rule": {
        "name",
        "action",
        "onJobFailureReasons",
        "onJobFailureMessagePatterns",
        "targetReplicatedJobs",
    },
    "replicatedJob": {"name", "groupName", "template", "replicas", "dependsOn"},
    "podFailurePolicy": {"rules"},
    "podRule": {"action", "onExitCodes", "onPodConditions"},
    "onExitCodes": {"containerName", "operator", "values"},
}


def unknown(kind: str, value: dict[str, Any]) -> Iterator[str]:
    """Returns the fields of ``value`` that the schema does not have."""
    yield from (f"{kind}: unknown field {name}" for name in set(value) - FIELDS[kind])


def violations(resource: dict[str, Any]) -> Iterator[str]:
    """Returns why an API server would refuse a JobSet."""
    if (resource["apiVersion"], resource["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        yield "not a JobSet of v1alpha2"
    spec = resource["spec"]
    yield from unknown("spec", spec)
    policy = spec.get("failurePolicy", {})
    yield from unknown("failurePolicy", policy)
    for rule in policy.get("rules", []):
        yield from unknown("rule", rule)
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            yield f"rule: name {rule['name']}"
        if rule["action"] not in ACTIONS:
            yield f"rule: action {rule['action']}"
        if not set(rule.get("onJobFailureReasons", ())) <= REASONS:
            yield f"rule: reasons {rule['onJobFailureReasons']}"
    for replicated in spec["replicatedJobs"]:
        yield from unknown("replicatedJob", replicated)
        yield from job_violations(resource["metadata"]["name"], replicated)


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
        yield from unknown("podRule", rule)
        codes = rule["onExitCodes"]
        yield from unknown("onExitCodes", codes)
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
