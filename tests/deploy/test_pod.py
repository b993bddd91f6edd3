"""deploy/tpu_pod.sh and deploy/tpu_worker.sh, executed on two workers whose `nalora` waits or ends at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVES = """#!/bin/bash
trap 'echo "interrupted by SIGTERM; saved step 3; continue with --resume"; exit 143' TERM
echo "$HF_TOKEN: $*"
while true; do sleep 0.05; done
"""
RUN = ("--", "--output", "gs://bucket/run", "--model", "a model")
DELETES = ("gcloud", "compute", "tpus", "queued-resources", "delete")
BILLED = "is billed until it is deleted: deploy/tpu_pod.sh delete pod --zone us-west4-a"


def wait_until(condition: Callable[[], Any], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def test_a_run_starts_detached_with_a_private_token_and_stops_with_its_status(make_cloud) -> None:
    cloud = make_cloud(program=SAVES)
    created = cloud.pod("create", "--type", "v5litepod-8", "--spot")
    assert BILLED in created.stdout, created.stderr
    wanted = "--node-id pod --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --spot"
    assert wanted in " ".join(cloud.calls("gcloud")[0])
    started = cloud.pod("start", *RUN, HF_TOKEN="hf_secret")
    assert started.returncode == 0, started.stderr
    assert len(re.findall(r": running, pid \d+", started.stdout)) == 2
    assert BILLED in started.stdout
    logs = [cloud.home(f"pod-{i}") / "nalora-run" / "log" for i in range(2)]
    wait_until(lambda: all("hf_secret: " in log.read_text() for log in logs))
    for pid in cloud.pids():
        assert b"hf_secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for worker in ("pod-0", "pod-1"):
        assert cloud.home(worker).joinpath("nalora-launch").stat().st_mode & 0o077 == 0
        assert not cloud.home(worker).joinpath("nalora-launch", "hf_token").exists()  # read, then removed
    assert "hf_secret" not in cloud.record.read_text()  # in no argument of gcloud
    assert not list(cloud.laptop.glob("tmp*"))
    pids = cloud.pids()
    again = cloud.pod("start", *RUN)
    assert (again.returncode, cloud.pids()) == (0, pids)
    assert "already running: left as it is" in again.stdout
    command = "train --output gs://bucket/run --model a model --resume auto"
    assert command in cloud.pod("logs").stdout
    with (cloud.home("pod-0") / "nalora-launch" / "worker.sh").open("a") as script:
        script.write("fi (\n")  # a next start replaces the file while this run's shell still reads it
    stopped = cloud.pod("stop")
    assert "syntax error" not in logs[0].read_text()
    assert stopped.stdout.count("ended, status 143: stopped, with a checkpoint; start resumes") == 2
    assert "ACTIVE" in cloud.pod("status").stdout
    assert cloud.pod("delete").returncode == 0
    assert not list(cloud.folder.glob("*.node"))


def test_start_refuses_an_output_that_workers_do_not_share(make_cloud) -> None:
    cloud = make_cloud()
    for flags in ((), ("--", "--output", "runs/here"), ("--output", "gs://b/r")):
        refused = cloud.pod("start", *flags)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: --output: expected ")
    assert cloud.pod("create", "--type", "v3-8").returncode == 2
    assert not cloud.calls()


def test_a_slice_whose_run_is_stopped_is_not_deleted(make_cloud) -> None:
    cloud = make_cloud(program=SAVES, delete_after=60)
    cloud.pod("create", "--type", "v6e-8")
    cloud.pod("start", "--delete-when-done", *RUN)
    deleter = int((cloud.home("pod-0") / "nalora-run" / "deleter").read_text())
    assert Path(f"/proc/{deleter}").exists()
    assert cloud.pod("stop").returncode == 0
    wait_until(lambda: not Path(f"/proc/{deleter}").exists())
    assert not cloud.calls(*DELETES)


def test_a_slice_is_deleted_when_its_run_has_ended(make_cloud) -> None:
    cloud = make_cloud(program="#!/bin/bash\nexit 2\n")
    cloud.pod("create", "--type", "v6e-8")
    started = cloud.pod("start", "--delete-when-done", *RUN)
    assert "The slice pod will be deleted when the run has ended." in started.stdout
    assert "is billed until" not in started.stdout
    wait_until(lambda: cloud.calls(*DELETES, "pod"))


def test_a_slice_without_hosts_has_a_status_and_starts_nothing(make_cloud) -> None:
    cloud = make_cloud()
    cloud.pod("create", "--type", "v6e-8")
    (cloud.folder / "pod.state").write_text("WAITING_FOR_RESOURCES")
    (cloud.folder / "pod.node").unlink()
    status = cloud.pod("status")
    assert (status.returncode, status.stderr) == (0, "")
    billed = "The workers can be reached, and are billed, while the state is ACTIVE."
    assert status.stdout.splitlines() == ["WAITING_FOR_RESOURCES", billed]
    refused = cloud.pod("start", *RUN)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        "expected the state ACTIVE, found WAITING_FOR_RESOURCES; wait: deploy/tpu_pod.sh" in refused.stderr
    )
    absent = cloud.pod("status", name="other")
    assert (absent.returncode, absent.stdout) == (2, "")
    assert "error: other: expected a slice in us-west4-a, found none; create it first" in absent.stderr
