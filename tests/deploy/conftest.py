"""A cloud of slices with two workers each that a test may create, start, stop and delete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.common import buckets
from tests.deploy import stand_ins

# Of the image (Ubuntu 22.04) what deploy/ uses. Neither python3.11 nor gcsfuse is among its
# commands.
IMAGE = "bash cat cp cut date env grep gzip hostname mkdir nohup rm sed setsid sha256sum sleep tail tar dirname"


class Cloud:
    """Runs deploy/tpu_pod.sh on a laptop whose gcloud is tests/deploy/stand_ins.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.laptop, self.record = (
            folder / "cloud",
            folder / "laptop",
            folder / "calls.jsonl",
        )
        commands = self.folder / "commands"  # of a worker
        for path in (commands / "python3", commands / "gcloud", self.laptop / "gcloud"):
            stand_ins.write(path)
        for name in IMAGE.split():
            (commands / name).symlink_to(shutil.which(name) or name)
        self.environment = {"PATH": f"{self.laptop}:/usr/bin:/bin", "HOME": str(folder / "home")}
        self.environment |= {"TMPDIR": str(self.laptop), "CLOUD": str(self.folder)}
        self.environment |= {"DEPLOY_RECORD": str(self.record), "NALORA_DELETE_AFTER": "60"}

    def pod(self, action: str, *words: str, name: str = "pod", **variables: str) -> Any:
        """Runs ``deploy/tpu_pod.sh ACTION NAME --zone ... WORDS`` to its end."""
        command = [
            stand_ins.ROOT / "deploy" / "tpu_pod.sh",
            action,
            name,
            "--zone",
            "us-west4-a",
            *words,
        ]
        options = {"env": self.environment | variables, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, timeout=1500, **options)

    def pids(self, kind: str = "pid") -> list[int]:
        """Returns the process ids of all runs that were started and may still live."""
        return [int(path.read_text()) for path in self.folder.glob(f"*/nalora-run/{kind}")]

    def calls(self, *start: str) -> list[list[str]]:
        """Returns the calls of stand-ins that begin with ``start``."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for call in map(json.loads, lines) if tuple(call[: len(start)]) == start]


@pytest.fixture(autouse=True)
def no_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets of the pages are empty: `--resume auto` finds no settings of an earlier run
    there."""
    monkeypatch.setattr(buckets, "exists", lambda name: False)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud whose processes end with the test."""
    made = Cloud(tmp_path)
    yield made
    for pid in made.pids():
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"nalora" in command.read_bytes():
            os.kill(pid, 9)
