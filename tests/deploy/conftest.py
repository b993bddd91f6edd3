"""A cloud of slices with two workers each that a test may create, start, stop and delete."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.common import buckets
from tests import xla_options
from tests.deploy import stand_ins

ZONE = ("--zone", "us-west4-a")
SHARED = ("CLOUD", "DEPLOY_RECORD")  # variables of the stand-ins


class Cloud:
    """Runs deploy/tpu_pod.sh on a laptop whose gcloud is tests/deploy/stand_ins.py."""

    def __init__(self, folder: Path, nodes: tuple[str, ...], program: str, delete_after: int) -> None:
        self.folder, self.laptop, self.record = folder / "cloud", folder / "laptop", folder / "calls.jsonl"
        commands = folder / "commands"  # of a worker
        for path in (self.folder, self.laptop / "home", commands):
            path.mkdir(parents=True)
        for name in stand_ins.IMAGE.split():
            (commands / name).symlink_to(shutil.which(name) or name)
        for path in (commands / "python3", commands / "gcloud", self.laptop / "gcloud"):
            stand_ins.write(path)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        names = [f"{node}-{worker}" for node in nodes for worker in range(2)]
        common = {
            "PATH": str(commands),
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(len(names)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": xla_options.flags(1),
            "NALORA_NATIVE": "0",
            "NALORA_CACHE": str(folder / "cache"),
            "NALORA_PROGRAM": program,
            "NALORA_DELETE_AFTER": str(delete_after),
            "DEPLOY_RECORD": str(self.record),
            "CLOUD": str(self.folder),
        }
        workers = {name: common | {"JAX_PROCESS_ID": str(index)} for index, name in enumerate(names)}
        (self.folder / "workers.json").write_text(json.dumps(workers))
        self.environment = {"PATH": f"{self.laptop}:/usr/bin:/bin", "HOME": str(self.laptop / "home")}
        self.environment |= {"TMPDIR": str(self.laptop), **{name: common[name] for name in SHARED}}

    def pod(self, action: str, *words: str, name: str = "pod", **variables: str) -> Any:
        """Runs ``deploy/tpu_pod.sh ACTION NAME --zone ... WORDS`` to its end."""
        command = [str(stand_ins.ROOT / "deploy" / "tpu_pod.sh"), action, name, *ZONE, *words]
        options = {"env": self.environment | variables, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, timeout=1500, **options)

    def home(self, worker: str) -> Path:
        return self.folder / worker

    def pids(self) -> list[int]:
        """Returns the process ids of all runs that were started and may still live."""
        return [int(path.read_text()) for path in self.folder.glob("*/nalora-run/pid")]

    def calls(self, *start: str) -> list[list[str]]:
        """Returns the calls of stand-ins that begin with ``start``."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for call in map(json.loads, lines) if tuple(call[: len(start)]) == start]


@pytest.fixture(autouse=True)
def no_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets of the pages are empty: `--resume auto` finds no settings of an earlier run there."""
    monkeypatch.setattr(buckets, "exists", lambda name: False)


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """Makes a cloud whose processes end with the test."""
    clouds: list[Cloud] = []

    def make(*nodes: str, program: str = "", delete_after: int = 0) -> Cloud:
        clouds.append(Cloud(tmp_path, nodes or ("pod",), program, delete_after))
        return clouds[-1]

    yield make
    for pid in (pid for cloud in clouds for pid in cloud.pids()):
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"nalora" in command.read_bytes():
            os.kill(pid, 9)
