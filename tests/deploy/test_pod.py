"""deploy/tpu_pod.sh and deploy/tpu_worker.sh, executed on two workers with a `nalora` that waits or
fails."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = ("--", "--output", "gs://bucket/run", "--model", "a model")
DELETES = ("gcloud", "compute", "tpus", "queued-resources", "delete")
BILLED = "is billed until it is deleted: deploy/tpu_pod.sh delete pod --zone us-west4-a"


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def test_a_run_starts_detached_with_a_private_token_and_stops_with_its_status(cloud) -> None:
    created = cloud.pod("create", "--type", "v5litepod-8", "--spot")
    assert BILLED in created.stdout, created.stderr
    wanted = (
        "--node-id pod --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --spot"
    )
    assert wanted in " ".join(cloud.calls("gcloud")[0])
    started = cloud.pod("start", *RUN, HF_TOKEN="hf_secret")
    assert started.returncode == 0, started.stderr
    assert len(re.findall(r": running, pid \d+", started.stdout)) == 2
    assert BILLED in started.stdout
    homes = [cloud.folder / f"pod-{worker}" for worker in range(2)]
    logs = [home / "nalora-run" / "log" for home in homes]
    wait_until(lambda: all("hf_secret: " in log.read_text() for log in logs))
    pids = cloud.pids()
    for home, pid in zip(homes, pids, strict=True):
        assert b"hf_secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert (home / "nalora-launch").stat().st_mode & 0o077 == 0
        assert not (home / "nalora-launch" / "hf_token").exists()  # read, then removed
    assert "hf_secret" not in cloud.record.read_text()  # in no argument of gcloud
    assert not list(cloud.laptop.glob("tmp*"))
    again = cloud.pod("start", *RUN)
    assert (again.returncode, cloud.pids()) == (0, pids)
    assert "already running: left as it is" in again.stdout
    command = "train --output gs://bucket/run --model a model --resume auto"
    assert command in cloud.pod("logs").stdout
    with (homes[0] / "nalora-launch" / "worker.sh").open("a") as script:
        script.write(
            "fi (\n"
        )  # a next start replaces the file while this run's shell still reads it
    stopped = cloud.pod("stop")
    assert "syntax error" not in logs[0].read_text()
    assert stopped.stdout.count("ended, status 143: stopped, with a checkpoint; start resumes") == 2


def test_start_refuses_an_output_that_workers_do_not_share(cloud) -> None:
    for flags in ((), ("--", "--output", "runs/here"), ("--output", "gs://b/r")):
        refused = cloud.pod("start", *flags)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: --output: expected ")
    assert cloud.pod("create", "--type", "v3-8").returncode == 2
    assert not cloud.calls()


def test_a_slice_is_deleted_when_its_run_has_ended_but_not_when_it_is_stopped(cloud) -> None:
    cloud.pod("create", "--type", "v6e-8")
    started = cloud.pod("start", "--delete-when-done", *RUN)
    assert "The slice pod will be deleted when the run has ended." in started.stdout
    assert "is billed until" not in started.stdout
    (deleter,) = cloud.pids("deleter")
    assert Path(f"/proc/{deleter}").exists()
    assert cloud.pod("stop").returncode == 0
    wait_until(lambda: not Path(f"/proc/{deleter}").exists())
    assert not cloud.calls(*DELETES)
    flags = ("--", "--output", "gs://bucket/failing")
    cloud.pod("start", "--delete-when-done", *flags, NALORA_DELETE_AFTER="0")
    wait_until(lambda: cloud.calls(*DELETES, "pod"))


def test_a_slice_without_hosts_has_a_status_and_starts_nothing(cloud) -> None:
    cloud.pod("create", "--type", "v6e-8")
    (cloud.folder / "pod.queue").write_text("WAITING_FOR_RESOURCES pod")
    status = cloud.pod("status")
    assert (status.returncode, status.stderr) == (0, "")
    billed = "The workers can be reached, and are billed, while the state is ACTIVE."
    assert status.stdout.splitlines() == ["WAITING_FOR_RESOURCES", billed]
    refused = cloud.pod("start", *RUN)
    assert (refused.returncode, refused.stdout) == (2, "")
    expected = "expected the state ACTIVE, found WAITING_FOR_RESOURCES; wait: deploy/tpu_pod.sh"
    assert expected in refused.stderr
    absent = cloud.pod("status", name="other")
    assert (absent.returncode, absent.stdout) == (2, "")
    assert (
        "error: other: expected a slice in us-west4-a, found none; create it first" in absent.stderr
    )
