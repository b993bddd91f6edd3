"""A cloud of one slice with two workers that a test may create, start, stop and delete."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nalora_jax.common import buckets
from tests import xla_options
from tests.deploy import sandbox

ZONE = ("--zone", "us-west4-a")


class Cloud:
    """Runs deploy/tpu_pod.sh on a laptop whose gcloud is tests/deploy/gcloud.py."""

    def __init__(self, folder: Path, *, nodes: tuple[str, ...] = ("pod",), program: str = "") -> None:
        self.folder = folder / "cloud"
        self.shared = folder / "shared"
        self.laptop = folder / "laptop"
        for path in (self.folder, self.shared, self.laptop / "home"):
            path.mkdir(parents=True)
        self.record = sandbox.Record(self.shared / "calls.jsonl")
        sandbox.write_program(self.laptop / "gcloud", "gcloud")
        tools = {"python3": "python_tools", "gcloud": "gcloud"}
        commands = sandbox.make_commands(folder / "commands", **tools)
        self.settings = {
            "workers": self._workers(nodes, program),
            "shared": str(self.shared),
            "commands": str(commands),
        }
        self.save()

    def _workers(self, nodes: tuple[str, ...], program: str) -> dict[str, dict[str, str]]:
        names = [f"{node}-{worker}" for node in nodes for worker in range(2)]
        common = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": str(len(names)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": xla_options.flags(1),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "NALORA_NATIVE": "0",
            "NALORA_CACHE": str(self.shared / "cache"),
            "NALORA_PROGRAM": program,
            "NALORA_DELETE_AFTER": "0",
            "DEPLOY_RECORD": str(self.record.path),
            "CLOUD": str(self.folder),
        }
        return {name: common | {"JAX_PROCESS_ID": str(index)} for index, name in enumerate(names)}

    def save(self) -> None:
        """Writes the settings for the stand-ins."""
        (self.folder / "machines.json").write_text(json.dumps(self.settings))

    def environment(self) -> dict[str, str]:
        """Returns the environment of a shell on the laptop."""
        return {
            "PATH": f"{self.laptop}:/usr/bin:/bin",
            "HOME": str(self.laptop / "home"),
            "TMPDIR": str(self.laptop),
            "CLOUD": str(self.folder),
            "DEPLOY_RECORD": str(self.record.path),
        }

    def pod(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs ``deploy/tpu_pod.sh WORDS`` to its end."""
        command = [str(sandbox.ROOT / "deploy" / "tpu_pod.sh"), *words]
        return subprocess.run(
            command,
            env=self.environment() | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )

    def home(self, worker: str) -> Path:
        """Returns the home folder of a worker."""
        return self.folder / worker

    def pids(self) -> list[int]:
        """Returns the process ids of all runs that were started and may still live."""
        return [int(path.read_text()) for path in self.folder.glob("*/nalora-run/pid")]


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def no_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets of the pages are empty: `--resume auto` finds no settings of an earlier run there."""
    monkeypatch.setattr(buckets, "exists", lambda name: False)


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """Makes clouds whose processes end with the test."""
    clouds: list[Cloud] = []

    def make(*nodes: str, program: str = "") -> Cloud:
        clouds.append(Cloud(tmp_path, nodes=nodes or ("pod",), program=program))
        return clouds[-1]

    yield make
    for cloud in clouds:
        for pid in cloud.pids():
            if b"nalora" in read(Path(f"/proc/{pid}/cmdline")):
                os.kill(pid, 9)
        shutil.rmtree(cloud.folder, ignore_errors=True)


def read(path: Path) -> bytes:
    """Returns the bytes of a file, none if there is no such file."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
