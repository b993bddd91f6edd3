"""Reports of several processes, and the bad states of a host, on files that stand for those of a TPU VM."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.cli import pod
from nalora_jax.cli.pod import Report
from tests import tiny

GIGABYTE = 10**9
SKEWED = """
import os, sys, time
from types import SimpleNamespace
from nalora_jax.__main__ import main
from nalora_jax.cli import doctor, pod

true = doctor.version
if os.environ["JAX_PROCESS_ID"] == "1":
    doctor.version = lambda name: "0.9.9" if name == "jaxlib" else true(name)
    pod.time = SimpleNamespace(time=lambda: time.time() + 60)
sys.exit(main(["doctor"]))
"""


def report(process: int, **changes: object) -> Report:
    values = {
        "versions": {"jax": "0.10.2", "jaxlib": "0.10.2"},
        "free": 4 * GIGABYTE,
        "total": 8 * GIGABYTE,
    }
    return Report(
        process, f"host{process}", **(values | {"devices": "4 x TPU v6 lite", "clock": 100.0} | changes)
    )


def test_two_processes_report_their_devices_versions_memory_and_clocks(tmp_path: Path) -> None:
    cache = tiny.new_cache(tmp_path / "cache")
    processes = tiny.start(["-c", SKEWED], count=2, devices=2, NALORA_CACHE=cache)
    (status, out, error), (other, quiet, _) = tiny.finish(processes)
    assert (status, other) == (1, 1), error
    lines = [" ".join(line.split()) for line in out.splitlines()]
    (first,) = (line for line in lines if line.startswith("process 0 ("))
    assert "2 x cpu; " in first
    assert " GB free; clock -30.0 s" in first
    assert any(line.startswith("process 1 (") and "jaxlib 0.9.9" in line for line in lines)
    assert any(line.startswith("! jaxlib differ between processes: ") for line in lines)
    assert any("its clock is +30 s off" in line for line in lines)
    assert quiet.splitlines()[-1] == "process 0 prints the report"
    assert "Traceback" not in error


def test_a_process_that_is_left_alone_prints_its_host_and_ends_with_one_line(tmp_path: Path) -> None:
    code = "from nalora_jax.cli import pod; pod.WAIT = 3; from nalora_jax.__main__ import main; main(['doctor'])"
    variables = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    ((status, out, error),) = tiny.finish(tiny.start(["-c", code], NALORA_CACHE=str(tmp_path), **variables))
    assert status != 0
    assert "jaxlib" in out
    waiting, *_, line = error.splitlines()
    assert waiting.startswith("waiting up to 3 s for the other processes")
    assert line.startswith("error: the other processes: ")
    assert "stack trace" not in error


@pytest.mark.parametrize(
    ("reports", "problems"),
    [
        ([report(0)], []),
        ([report(0), report(1)], []),
        (
            [report(0), None],
            ["process 1 sent no report within 120 s: start nalora doctor on every host at the same time"],
        ),
        ([report(0, problems=["full"])], ["full"]),
        ([report(0, problems=["full"]), report(1, problems=["full"])], ["every process: full"]),
        ([report(0), report(1, problems=["full"])], ["process 1 (host1): full"]),
        (
            [report(0), report(1), report(2, versions={"jax": "0.10.2", "jaxlib": "0.10.1"})],
            [
                "jaxlib differ between processes: 0.10.2, but 0.10.1 in process 2 (host2); make all hosts the same"
            ],
        ),
        (
            [report(0), report(1), report(2, devices="3 x TPU v6 lite")],
            [
                "devices differ between processes: 4 x TPU v6 lite, but 3 x TPU v6 lite in process 2 (host2); "
                "make all hosts the same"
            ],
        ),
        (
            [report(0), report(1), report(2, clock=93.0)],
            ["process 2 (host2): its clock is -7 s off the others': let NTP set it"],
        ),
    ],
)
def test_differences_between_processes_are_named(reports: list[Report | None], problems: list[str]) -> None:
    assert list(pod.differences(reports)) == problems
    assert len(pod.rows(reports)) == len(reports)


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """The device files of a TPU VM with two chips."""
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    for name in ("accel0", "vfio/1", "vfio/vfio"):
        (tmp_path / "dev" / name).touch()
    return tmp_path / "dev"


def test_the_process_that_holds_a_chip_is_named(dev: Path, tmp_path: Path) -> None:
    code = "import sys; files = [open(name) for name in sys.argv[1:]]; print(flush=True); input()"
    command = [sys.executable, "-c", code, str(dev / "accel0"), str(dev / "vfio" / "1")]
    lock = tmp_path / "lock"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (problem,) = pod.chip_problems(dev, lock=lock)
        holder.communicate(b"\n")
    assert re.fullmatch(rf"process {holder.pid} \(\S+\) holds {dev}/accel0, {dev}/vfio/1: .*", problem)
    assert not list(pod.chip_problems(dev, lock=lock))


def test_the_lock_of_libtpu_counts_while_a_process_holds_it(dev: Path, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        assert not list(pod.chip_problems(dev, lock=lock))  # left by a process that has ended
        fcntl.flock(file, fcntl.LOCK_EX)
        (problem,) = pod.chip_problems(dev, lock=lock)
    assert f"another process holds {lock}" in problem
    assert not list(pod.chip_problems(tmp_path / "none", lock=lock))


def test_a_lock_that_this_user_cannot_open_is_named(
    dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").touch()

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    (problem,) = pod.chip_problems(dev, lock=tmp_path / "lock")
    assert f"sudo rm {tmp_path}/lock" in problem


def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       8000000 kB\nMemFree:   1 kB\nMemAvailable:   6000000 kB\n")
    assert pod.host_memory(info, tmp_path) == (6000000 * 1024, 8000000 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert pod.host_memory(info, tmp_path) == (6000000 * 1024, 8000000 * 1024)
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("2500000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    assert pod.host_memory(info, tmp_path) == (GIGABYTE, 3 * GIGABYTE)
    (problem,) = pod.memory_problems(*pod.host_memory(info, tmp_path))
    assert problem.startswith("1.0 of 3.0 GB of host memory are free")
    assert pod.host_memory(tmp_path / "none", tmp_path) == (0, 0)
    assert not list(pod.memory_problems(0, 0))
